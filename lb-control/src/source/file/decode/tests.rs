use super::*;

fn problems(text: &str) -> Vec<String> {
    let decoded = decode("f.yaml", text);
    let wrong = decoded.documents.iter().filter_map(|document| document.item.as_ref().err()).flatten();
    wrong.chain(&decoded.unreadable).chain(&decoded.ignored).map(ToString::to_string).collect()
}

fn service(spec: &str) -> String {
    format!("apiVersion: v1\nkind: Service\nmetadata: {{name: web}}\nspec: {{{spec}}}\n")
}

#[test]
fn nothing_is_in_an_empty_file() {
    for text in ["", "\n", "# nothing\n", "---\n", "---\n---\n# x\n---\n", "\u{feff}", "...\n", "null\n"] {
        let decoded = decode("f", text);
        assert!(decoded.documents.is_empty() && decoded.unreadable.is_empty(), "{text:?}: {decoded:?}");
    }
}

#[test]
fn wrong_fields_are_named_with_their_path() {
    for (spec, expected) in [
        ("ports: [{port: 80, prot: TCP}]", "spec.ports[0].prot: unknown field"),
        ("typ: LoadBalancer", "spec.typ: unknown field"),
        ("ports: [{port: http}]", "spec.ports[0].port: invalid type: string \"http\", expected i32"),
        ("ports: [{port: 65536}]", "spec.ports[0].port: 65536 is no port number (1 to 65535)"),
        ("ports: [{port: 80, protocol: tcp}]", "spec.ports[0].protocol: `tcp` is no protocol"),
        ("ports: [{port: 80, targetPort: 0}, {port: 81}]", "spec.ports[0].name: is needed"),
        ("ports: [{name: a, port: 80}, {name: a, port: 81}]", "spec.ports[1].name: `a` is taken"),
        ("ports: [{name: a, port: 80}, {name: b, port: 80}]", "spec.ports[1].port: 80/TCP is taken"),
        ("ipFamilies: [IPv5]", "spec.ipFamilies[0]: `IPv5` is neither"),
        ("ipFamilies: [IPv4, IPv6]", "spec.ipFamilyPolicy: must be PreferDualStack"),
        ("loadBalancerIP: 1.2.3", "spec.loadBalancerIP: `1.2.3` is no IP address"),
        ("externalTrafficPolicy: local", "spec.externalTrafficPolicy: `local` is neither"),
    ] {
        let problems = problems(&service(spec));
        let expected = format!("f.yaml: document 1 (line 1): Service default/web: {expected}");
        assert!(problems[0].starts_with(&expected), "{problems:?}\nexpected {expected}");
    }
}

#[test]
fn a_broken_document_leaves_the_others() {
    let text = format!("{}---\nkind: [\n---\n{}", service(""), service("").replace("web", "api"));
    let decoded = decode("f.yaml", &text);
    assert_eq!(decoded.documents.len(), 2);
    assert_eq!(decoded.documents[1].place.line, 7);
    let message = decoded.unreadable[0].to_string();
    assert!(message.starts_with("f.yaml: document 2 (line 5): "), "{message}");
}

#[test]
fn markers_inside_of_texts_do_not_split() {
    let text = "apiVersion: v1\nkind: Service\nmetadata:\n  name: web\n  annotations:\n    note: |\n      ---\n      x\nspec: {}\n";
    assert_eq!(decode("f", text).documents.len(), 1);
    assert_eq!(problems(text), Vec::<String>::new());
}

#[test]
fn other_kinds_are_named() {
    let problems = problems("apiVersion: apps/v1\nkind: Deployment\nmetadata: {name: d, namespace: n}\n");
    assert!(problems[0].contains("Deployment n/d: apps/v1 Deployment is ignored"), "{problems:?}");
    assert!(problems_of("a: 1\n").contains("`apiVersion` and `kind` are needed"));
}

fn problems_of(text: &str) -> String {
    problems(text).join("\n")
}

#[test]
fn duplicate_keys_are_refused() {
    let text = problems_of("apiVersion: v1\nkind: Service\nkind: Service\nmetadata: {name: a}\n");
    assert!(text.contains("duplicate") && text.contains("line 3"), "{text}");
}

#[test]
fn lists_and_json_are_read() {
    let text = "{\n\t\"apiVersion\": \"v1\", \"kind\": \"List\", \"items\": [\n\t{\"apiVersion\": \"v1\", \"kind\": \"Service\", \"metadata\": {\"name\": \"web\"}, \"spec\": {\"ports\": [{\"port\": 0}]}}]}";
    assert_eq!(
        problems_of(text),
        "f.yaml: document 1 (line 1), item 1: Service default/web: spec.ports[0].port: 0 is no port number (1 to 65535)"
    );
}

#[test]
fn conditions_have_their_defaults() {
    let text = "apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata: {name: web-1, labels: {kubernetes.io/service-name: web}}\naddressType: IPv4\nports: [{port: 8080}]\nendpoints:\n- addresses: [192.0.2.1]\n- addresses: [192.0.2.2]\n  conditions: {ready: false}\n- addresses: [192.0.2.3]\n  conditions: {ready: false, serving: true, terminating: true}\n";
    let decoded = decode("f", text);
    let Ok(Item::Slice(slice)) = &decoded.documents[0].item else { panic!("{decoded:?}") };
    let conditions: Vec<_> = slice
        .endpoints
        .iter()
        .map(|endpoint| (endpoint.ready, endpoint.serving, endpoint.terminating))
        .collect();
    assert_eq!(conditions, [(true, true, false), (false, false, false), (false, true, true)]);
    assert_eq!(slice.service.as_deref(), Some("web"));
}

#[test]
fn pools_are_checked() {
    let pool = |spec: &str| {
        problems_of(&format!(
            "apiVersion: pointsman.dev/v1alpha1\nkind: AddressPool\nmetadata: {{name: p}}\nspec: {{{spec}}}\n"
        ))
    };
    assert_eq!(
        pool("addresses: [192.0.2.0/24, 2001:db8::-2001:db8::ff], avoidBuggyIPs: true, priority: 5"),
        ""
    );
    assert!(
        pool("addresses: [192.0.2.0/24, 192.0.2.7/32]")
            .contains("spec.addresses[1]: `192.0.2.7/32` overlaps")
    );
    assert!(pool("addresses: []").contains("spec.addresses: is empty"));
    assert!(pool("adresses: []").contains("spec.adresses: unknown field"));
    assert!(pool("autoAssign: 1, addresses: [192.0.2.0/24]").contains("spec.autoAssign: invalid type"));
}
