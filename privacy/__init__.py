"""Every guarantee Isocenter gives: what may leave a site, who may speak, what is written down. Imports nothing of ours."""

import os

# Makes TLS 1.3 the only version that gRPC can negotiate in this process. Its Python interface has no setting for that, only
# this one for the TLS 1.2 cipher suites, which it reads once, when it is loaded: hence here, before anything of ours loads it.
# The suite named needs an RSA certificate; ours are P-256, so no TLS 1.2 handshake succeeds. TLS 1.3 is not affected.
os.environ["GRPC_SSL_CIPHER_SUITES"] = "ECDHE-RSA-AES256-GCM-SHA384"
