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
