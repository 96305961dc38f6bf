//! `docs/pretrainjob.md`: every field of the resource, from its definition.

use std::fmt::Write;

use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::JSONSchemaProps;
use kube::CustomResourceExt;

use super::PretrainJob;

const HEAD: &str = "\
# PretrainJob

Every field of the resource, and what the API server refuses. This page is what `anello crd --reference` prints; a test compares.
[On Kubernetes](kubernetes.md) tells how it is used.

";

/// Fields whose content is Kubernetes' own and described there.
const OF_KUBERNETES: [&str; 2] = ["resources", "coordinatorResources"];

/// The page.
pub fn reference() -> String {
    let definition = PretrainJob::crd().spec;
    let version = &definition.versions[0];
    let schema = version.schema.as_ref().and_then(|schema| schema.open_api_v3_schema.as_ref());
    let schema = schema.expect("the definition has a schema");
    let mut text = HEAD.to_owned();
    let names = &definition.names;
    let short = names.short_names.iter().flatten().cloned().collect::<Vec<_>>().join(", ");
    let _ = writeln!(
        text,
        "`apiVersion: {}/{}`, `kind: {}`; `kubectl get {}` (or `{short}`) shows:\n",
        definition.group, version.name, names.kind, names.plural
    );
    for column in version.additional_printer_columns.iter().flatten() {
        let wide = if column.priority == Some(1) { ", with `-o wide`" } else { "" };
        let _ = writeln!(text, "- **{}**: `{}`{wide}", column.name, column.json_path);
    }
    for part in ["spec", "status"] {
        let Some(props) = schema.properties.as_ref().and_then(|all| all.get(part)) else { continue };
        let _ = writeln!(text, "\n## {part}");
        if let Some(what) = &props.description {
            let _ = writeln!(text, "{}", one_line(what));
        }
        text += "\n| field | type | default | what |\n|---|---|---|---|\n";
        rows(&mut text, part, props);
    }
    text +=
        "\n## What is refused\nBesides wrong types, values out of range and fields that are not there:\n\n";
    refusals(&mut text, "", schema);
    text
}

fn one_line(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ").replace('|', "\\|")
}

fn kind_of(props: &JSONSchemaProps) -> String {
    let number = |value: f64| format!("{value}");
    let range = match (props.minimum, props.maximum) {
        (Some(low), Some(high)) => format!(", {} to {}", number(low), number(high)),
        (Some(low), None) => format!(", from {}", number(low)),
        _ => String::new(),
    };
    let kind = props.type_.clone().unwrap_or_else(|| "any".to_owned());
    let words: Option<Vec<String>> =
        props.enum_.as_ref().map(|words| words.iter().map(|word| word.0.to_string()).collect());
    match (words, &props.pattern) {
        (Some(words), _) => words.into_iter().filter(|word| word != "null").collect::<Vec<_>>().join(", "),
        (None, Some(pattern)) => format!("{kind}, `{}`", pattern.replace('|', "\\|")),
        (None, None) => format!("{kind}{range}"),
    }
}

fn rows(text: &mut String, path: &str, props: &JSONSchemaProps) {
    for (name, field) in props.properties.iter().flatten() {
        let required = props.required.iter().flatten().any(|required| required == name);
        let default = match &field.default {
            Some(value) => format!("`{}`", value.0),
            None if required => "required".to_owned(),
            None => String::new(),
        };
        let what = field.description.as_deref().map(one_line).unwrap_or_default();
        let _ = writeln!(text, "| `{path}.{name}` | {} | {default} | {what} |", kind_of(field));
        if field.type_.as_deref() == Some("object") && !OF_KUBERNETES.contains(&name.as_str()) {
            rows(text, &format!("{path}.{name}"), field);
        }
    }
}

fn refusals(text: &mut String, path: &str, props: &JSONSchemaProps) {
    for rule in props.x_kubernetes_validations.iter().flatten() {
        let message = rule.message.as_deref().unwrap_or(&rule.rule);
        let place = if path.is_empty() { "the whole".to_owned() } else { format!("`{path}`") };
        let _ = writeln!(text, "- {place}: {message}.");
    }
    for (name, field) in props.properties.iter().flatten() {
        let path = if path.is_empty() { name.clone() } else { format!("{path}.{name}") };
        refusals(text, &path, field);
    }
}
