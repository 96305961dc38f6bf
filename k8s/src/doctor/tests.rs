use k8s_openapi::api::rbac::v1::PolicyRule;

use super::rights::OF_JOBS;
use super::*;

/// What the doctor asks for is what the chart gives: of neither there is more.
#[test]
fn the_rights_that_are_asked_for_are_those_of_the_chart() {
    let helpers = include_str!("../../chart/templates/_helpers.tpl");
    let rules = helpers.split_once(r#"{{- define "anello.rules" -}}"#).expect("the chart has rules").1;
    let rules = rules.split_once("{{- end }}").expect("they end").0;
    let rules: Vec<PolicyRule> = serde_saphyr::from_str(rules).expect("they are plain YAML");
    let mut given = BTreeSet::new();
    for rule in &rules {
        for group in rule.api_groups.iter().flatten() {
            for resource in rule.resources.iter().flatten() {
                given.extend(rule.verbs.iter().map(|verb| [group, resource, verb].map(String::as_str)));
            }
        }
    }
    let asked =
        OF_JOBS.iter().flat_map(|right| right.verbs.iter().map(|v| [right.group, right.resource, *v]));
    assert_eq!(asked.collect::<BTreeSet<_>>(), given);
}

#[test]
fn questions_are_about_the_namespaces_that_the_controller_looks_after() {
    let words = |namespace, job_sets| -> Vec<String> {
        questions(namespace, "system", job_sets).iter().map(in_words).collect()
    };
    let all = words(None, true);
    for question in [
        "create jobs.batch in all namespaces",
        "patch pretrainjobs/status.anello.dev in all namespaces",
        "list pods in all namespaces",
        "delete jobsets.jobset.x-k8s.io in all namespaces",
        "update leases.coordination.k8s.io in namespace system",
    ] {
        assert!(all.iter().any(|of| of == question), "{question}: {all:?}");
    }
    let own = words(Some("research"), false);
    assert!(own.contains(&"create jobs.batch in namespace research".to_owned()), "{own:?}");
    assert!(own.iter().all(|question| !question.contains("jobset") && !question.contains("all namesp")));
    assert_eq!(own.len() + 4, all.len(), "four things are done with JobSets");
}

#[test]
fn a_definition_of_another_build_is_told_by_its_fields() {
    let ours = own_fields();
    for field in ["spec.workers.min", "spec.config.configMap.key", "status.phase"] {
        assert!(ours.contains(field), "{field}: {ours:?}");
    }
    let said = |theirs: &BTreeSet<String>| of_fields("jobs", &ours, theirs);
    assert_eq!(said(&ours), Ok("definition: jobs is served, and is this build's".to_owned()));
    let unknown = "definition: jobs is served; its fields are not told".to_owned();
    assert_eq!(said(&BTreeSet::new()), Ok(unknown));
    let (mut newer, mut older) = (ours.clone(), ours.clone());
    newer.insert("spec.future".to_owned());
    assert_eq!(said(&newer), Ok("definition: jobs is of a newer build: it also has spec.future".to_owned()));
    older.remove("spec.workers.kind");
    let lacks = "definition: jobs is of another build: it lacks spec.workers.kind".to_owned();
    assert_eq!(said(&older), Err(lacks));
    let little = BTreeSet::from(["spec.image".to_owned()]);
    let told = said(&little).expect_err("most is missing");
    assert!(told.ends_with(&format!(" and {} more", ours.len() - 1 - FIELDS_MAX)), "{told}");
}

#[test]
fn the_schema_is_found_in_what_the_api_server_publishes() {
    let definition = serde_json::to_value(PretrainJob::crd()).unwrap();
    let mut schema = definition["spec"]["versions"][0]["schema"]["openAPIV3Schema"].clone();
    schema["x-kubernetes-group-version-kind"] =
        serde_json::json!([{"group": "anello.dev", "kind": "PretrainJob", "version": "v1alpha1"}]);
    let document = serde_json::json!({"components": {"schemas": {"other": {}, "dev.anello.it": schema}}});
    assert_eq!(published(&document).map(fields), Some(own_fields()));
    assert_eq!(published(&serde_json::json!({"components": {"schemas": {"other": {}}}})), None);
}

#[test]
fn what_is_wrong_comes_with_a_remedy() {
    let account = Account { namespace: "system".to_owned(), name: "anello".to_owned() };
    let refused = questions(None, "system", false).into_iter().take(1).collect();
    assert_eq!(
        of_rights(&account, 30, Ok(refused)),
        Err("rights: service account system/anello may not get pretrainjobs.anello.dev in all namespaces; `helm upgrade` \
             mends the chart's roles"
            .to_owned())
    );
    assert!(of_rights(&account, 30, Ok(Vec::new())).is_ok());
    let beats = Pulse::Beats { holder: "a".to_owned() };
    assert_eq!(
        of_lease(&beats, "system"),
        Ok("lease: a holds anello-controller in namespace system and renews it".to_owned())
    );
    let silent = Pulse::Silent { holder: "a".to_owned(), watched: Duration::from_secs(20) };
    for (pulse, told) in [
        (Pulse::Absent, "nobody ever held anello-controller"),
        (Pulse::LetGo, "its last holder let it go"),
        (silent, "a holds anello-controller in namespace system and did not renew it in 20 s"),
    ] {
        let said = of_lease(&pulse, "system").expect_err("nobody looks after jobs");
        assert!(said.contains(told) && said.contains("`kubectl -n system logs"), "{said}");
    }
    let groups = BTreeSet::from(["kueue.x-k8s.io".to_owned()]);
    let told = "others: JobSet is not, which jobs with workers.kind JobSet need; Kueue is there";
    assert_eq!(others(&groups), told);
}
