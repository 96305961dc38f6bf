{{- define "anello.name" -}}
{{- if contains "anello" .Release.Name }}{{ .Release.Name | trunc 50 | trimSuffix "-" }}{{ else }}{{ printf "%s-anello" .Release.Name | trunc 50 | trimSuffix "-" }}{{ end -}}
{{- end }}

{{- define "anello.account" -}}
{{- default (ternary (include "anello.name" .) "default" .Values.serviceAccount.create) .Values.serviceAccount.name -}}
{{- end }}

{{- define "anello.selector" -}}
app.kubernetes.io/name: anello-controller
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "anello.labels" -}}
{{ include "anello.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end }}

{{/* What the restricted pod security standard wants of a pod, and of its container. */}}
{{- define "anello.podSecurity" -}}
runAsNonRoot: true
runAsUser: 65532
runAsGroup: 65532
fsGroup: 65532
seccompProfile:
  type: RuntimeDefault
{{- end }}

{{- define "anello.security" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
{{- end }}

{{/* The controller's certificate, under the names that --tls looks for. */}}
{{- define "anello.tlsMounts" -}}
- name: tls
  mountPath: /etc/anello/tls
  readOnly: true
{{- end }}

{{- define "anello.tlsVolumes" -}}
- name: tls
  secret:
    secretName: {{ .Values.tls.secretName }}
    defaultMode: 0440
    items:
    {{- if .Values.certManager.enabled }}
    - { key: ca.crt, path: ca.pem }
    - { key: tls.crt, path: user.pem }
    - { key: tls.key, path: user.key }
    {{- else }}
    - { key: ca.pem, path: ca.pem }
    - { key: user.pem, path: user.pem }
    - { key: user.key, path: user.key }
    {{- end }}
{{- end }}

{{/* What the controller does, and nothing else. */}}
{{- define "anello.rules" -}}
- apiGroups: [anello.dev]
  resources: [pretrainjobs]
  verbs: [get, list, watch, patch, delete]
- apiGroups: [anello.dev]
  resources: [pretrainjobs/status]
  verbs: [patch]
- apiGroups: [anello.dev]
  resources: [pretrainjobs/finalizers]
  verbs: [update]
- apiGroups: [apps]
  resources: [deployments]
  verbs: [get, list, watch, create, patch]
- apiGroups: [batch]
  resources: [jobs]
  verbs: [get, list, watch, create, patch, delete]
# For jobs with workers.kind JobSet. Where nobody installed JobSet, it is a right to nothing.
- apiGroups: [jobset.x-k8s.io]
  resources: [jobsets]
  verbs: [get, create, patch, delete]
- apiGroups: [""]
  resources: [services]
  verbs: [get, create, patch]
- apiGroups: [""]
  resources: [configmaps]
  verbs: [create, patch]
- apiGroups: [networking.k8s.io]
  resources: [networkpolicies]
  verbs: [create, patch]
- apiGroups: [""]
  resources: [pods]
  verbs: [list]
- apiGroups: [events.k8s.io]
  resources: [events]
  verbs: [create, patch]
# Why no pod could be made: a quota.
- apiGroups: [""]
  resources: [events]
  verbs: [list]
{{- end }}
