//! How an API server behaves, as far as Pointsman depends on it. These run against the double, and
//! unchanged against any real cluster (`POINTSMAN_TEST_KUBECONFIG`): that is what keeps the double
//! honest.

use anyhow::{Context, Result, bail};
use futures::{StreamExt, TryStreamExt};
use k8s_openapi::api::core::v1::{ConfigMap, Namespace, Service};
use kube::{
    Api, Error,
    api::{DeleteParams, ListParams, Patch, PatchParams, PostParams, WatchEvent, WatchParams},
};
use pointsman_tests::apiserver::cluster::with_cluster;
use serde_json::json;

fn config_map(name: &str, value: &str) -> ConfigMap {
    serde_json::from_value(json!({ "metadata": { "name": name }, "data": { "key": value } }))
        .expect("a ConfigMap")
}

/// HTTP status and reason of what was answered.
fn status<T: std::fmt::Debug>(result: Result<T, Error>) -> (u16, String) {
    match result.expect_err("a failure") {
        Error::Api(status) => (status.code, status.reason),
        other => panic!("{other}"),
    }
}

#[test]
fn objects_are_created_read_changed_and_deleted() -> Result<()> {
    with_cluster(async |cluster| {
        let api: Api<ConfigMap> = Api::namespaced(cluster.client(), &cluster.namespace("crud").await?);
        let create = PostParams::default();
        let made = api.create(&create, &config_map("one", "1")).await?;
        let first = made.metadata.resource_version.clone().context("a version")?;
        assert!(made.metadata.uid.is_some() && made.metadata.creation_timestamp.is_some());
        let again = status(api.create(&create, &config_map("one", "2")).await);
        assert_eq!(again, (409, "AlreadyExists".into()));
        assert_eq!(api.get("one").await?, made);
        assert_eq!(status(api.get("two").await), (404, "NotFound".into()));

        let mut changed = made.clone();
        changed.data = config_map("one", "2").data;
        let changed = api.replace("one", &create, &changed).await?;
        assert_ne!(changed.metadata.resource_version, Some(first));
        // The old version cannot be replaced any more.
        assert_eq!(status(api.replace("one", &create, &made).await), (409, "Conflict".into()));
        // What changes nothing gets no new version.
        let same = api.replace("one", &create, &changed).await?;
        assert_eq!(same.metadata.resource_version, changed.metadata.resource_version);

        let patch = json!({ "data": { "key": null, "other": "3" } });
        let patched = api.patch("one", &PatchParams::default(), &Patch::Merge(&patch)).await?;
        assert_eq!(
            patched.data.context("data")?.into_iter().collect::<Vec<_>>(),
            [("other".into(), "3".into())]
        );

        let stale = DeleteParams::default().preconditions(kube::api::Preconditions {
            uid: Some("00000000-0000-0000-0000-000000000000".into()),
            resource_version: None,
        });
        assert_eq!(status(api.delete("one", &stale).await), (409, "Conflict".into()));
        api.delete("one", &DeleteParams::default()).await?;
        assert_eq!(status(api.delete("one", &DeleteParams::default()).await), (404, "NotFound".into()));
        Ok(())
    })
}

#[test]
fn a_watch_shows_every_change_since_a_list() -> Result<()> {
    with_cluster(async |cluster| {
        let api: Api<ConfigMap> = Api::namespaced(cluster.client(), &cluster.namespace("watch").await?);
        let wanted = ListParams::default().labels("pointsman=yes");
        let start = api.list(&wanted).await?.metadata.resource_version.context("a version")?;
        let labelled = |value: &str, label: &str| {
            let mut object = config_map("one", value);
            object.metadata.labels = Some([("pointsman".to_owned(), label.to_owned())].into());
            object
        };
        api.create(&PostParams::default(), &labelled("1", "yes")).await?;
        api.create(&PostParams::default(), &config_map("not-selected", "1")).await?;
        api.replace("one", &PostParams::default(), &labelled("2", "yes")).await?;
        // It leaves the selection, and comes back.
        api.replace("one", &PostParams::default(), &labelled("3", "no")).await?;
        api.replace("one", &PostParams::default(), &labelled("4", "yes")).await?;
        api.delete("one", &DeleteParams::default()).await?;

        let events = api.watch(&WatchParams::default().labels("pointsman=yes"), &start).await?;
        let seen: Vec<String> = events
            .take(5)
            .map_ok(|event| {
                let (word, object) = match event {
                    WatchEvent::Added(object) => ("added", object),
                    WatchEvent::Modified(object) => ("modified", object),
                    WatchEvent::Deleted(object) => ("deleted", object),
                    other => panic!("{other:?}"),
                };
                let name = object.metadata.name.unwrap_or_default();
                format!("{word} {name} {}", object.data.unwrap_or_default()["key"])
            })
            .try_collect()
            .await?;
        assert_eq!(seen, ["added one 1", "modified one 2", "deleted one 2", "added one 4", "deleted one 4"]);
        Ok(())
    })
}

#[test]
fn lists_are_read_page_by_page_as_of_the_first_page() -> Result<()> {
    with_cluster(async |cluster| {
        let api: Api<ConfigMap> = Api::namespaced(cluster.client(), &cluster.namespace("pages").await?);
        for number in 0..5 {
            let mut object = config_map(&format!("n{number}"), "1");
            object.metadata.labels = Some([("mine".to_owned(), "yes".to_owned())].into());
            api.create(&PostParams::default(), &object).await?;
        }
        let mut wanted = ListParams::default().labels("mine=yes").limit(2);
        let mut names = Vec::new();
        let mut versions = Vec::new();
        loop {
            let page = api.list(&wanted).await?;
            assert!(page.items.len() <= 2);
            names.extend(page.items.into_iter().filter_map(|object| object.metadata.name));
            versions.push(page.metadata.resource_version);
            if names.len() == 2 {
                api.delete("n4", &DeleteParams::default()).await?;
            }
            match page.metadata.continue_.filter(|token| !token.is_empty()) {
                Some(token) => wanted.continue_token = Some(token),
                None => break,
            }
        }
        assert_eq!(names, ["n0", "n1", "n2", "n3", "n4"]);
        versions.dedup();
        assert_eq!(versions.len(), 1, "{versions:?}");
        Ok(())
    })
}

#[test]
fn a_kube_rs_watcher_follows_a_kind() -> Result<()> {
    with_cluster(async |cluster| {
        let namespace = cluster.namespace("watcher").await?;
        let api: Api<Service> = Api::namespaced(cluster.client(), &namespace);
        let service = |name: &str| -> Service {
            serde_json::from_value(json!({
                "metadata": { "name": name },
                "spec": { "ports": [{ "port": 80 }] },
            }))
            .expect("a Service")
        };
        api.create(&PostParams::default(), &service("first")).await?;
        for streaming in [false, true] {
            let config = kube::runtime::watcher::Config::default();
            let config = if streaming { config.streaming_lists() } else { config };
            let mut events = std::pin::pin!(kube::runtime::watcher(api.clone(), config));
            let mut initial = Vec::new();
            loop {
                use kube::runtime::watcher::Event;
                match events.next().await.context("an event")?? {
                    Event::Init => {}
                    Event::InitApply(object) => initial.push(object.metadata.name.unwrap_or_default()),
                    Event::InitDone => break,
                    other => bail!("{other:?}"),
                }
            }
            assert_eq!(initial, ["first"], "streaming: {streaming}");
            let name = format!("later-{streaming}");
            api.create(&PostParams::default(), &service(&name)).await?;
            let event = events.next().await.context("an event")??;
            let kube::runtime::watcher::Event::Apply(object) = event else { bail!("{event:?}") };
            assert_eq!(object.metadata.name.as_deref(), Some(name.as_str()));
            api.delete(&name, &DeleteParams::default()).await?;
        }
        Ok(())
    })
}

#[test]
fn a_namespace_takes_its_content_along() -> Result<()> {
    with_cluster(async |cluster| {
        let name = cluster.namespace("ends").await?;
        let api: Api<ConfigMap> = Api::namespaced(cluster.client(), &name);
        api.create(&PostParams::default(), &config_map("one", "1")).await?;
        let start = api.list(&ListParams::default()).await?.metadata.resource_version.context("a version")?;
        cluster.clean_up().await?;
        let events = api.watch(&WatchParams::default(), &start).await?;
        let mut gone = std::pin::pin!(events.try_filter_map(async |event| Ok(match event {
            WatchEvent::Deleted(object) => object.metadata.name.filter(|name| name == "one"),
            _ => None,
        })));
        assert!(gone.next().await.context("an event")?.is_ok());
        let missing: Api<ConfigMap> = Api::namespaced(cluster.client(), &cluster.name("never"));
        let refused = missing.create(&PostParams::default(), &config_map("one", "1")).await;
        assert_eq!(status(refused), (404, "NotFound".into()));
        let _: Api<Namespace> = Api::all(cluster.client());
        Ok(())
    })
}
