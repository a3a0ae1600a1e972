{{- define "isocenter.labels" -}}
app.kubernetes.io/name: isocenter
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
{{- end }}

{{- define "isocenter.selector" -}}
app.kubernetes.io/name: isocenter
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "isocenter.image" -}}
{{- if .Values.image.digest }}{{ .Values.image.repository }}@{{ .Values.image.digest }}{{ else }}{{ .Values.image.repository }}:{{ .Values.image.tag }}{{ end }}
{{- end }}

{{- define "isocenter.confined" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
runAsNonRoot: true
capabilities: {drop: [ALL]}
{{- end }}

{{- define "isocenter.mounts" -}}
- {name: home, mountPath: /srv/isocenter}
- {name: scratch, mountPath: /tmp}
{{- end }}
