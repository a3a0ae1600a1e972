"""What is learned: studies, labels, images, networks, metrics. Knows neither Flower nor hospitals."""
