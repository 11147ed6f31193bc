//! Watches and lists as of a time, of the double and of real clusters alike.

use anyhow::{Context, Result, bail};
use futures::{StreamExt, TryStreamExt};
use k8s_openapi::api::core::v1::ConfigMap;
use kube::{
    Api, Error,
    api::{DeleteParams, ListParams, PostParams, VersionMatch, WatchEvent, WatchParams},
};
use pointsman_tests::apiserver::cluster::with_cluster;
use serde_json::json;

fn config_map(name: &str) -> ConfigMap {
    serde_json::from_value(json!({ "metadata": { "name": name } })).expect("a ConfigMap")
}

fn code<T: std::fmt::Debug>(result: Result<T, Error>) -> (u16, String) {
    match result.expect_err("a failure") {
        Error::Api(status) => (status.code, status.reason),
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_watch_may_begin_with_what_is_there() -> Result<()> {
    with_cluster(async |cluster| {
        let api: Api<ConfigMap> = Api::namespaced(cluster.client(), &cluster.namespace("initial").await?);
        let wanted = ListParams::default().labels("none=none");
        let before = api.list(&wanted).await?.metadata.resource_version.context("a version")?;
        let label = |mut object: ConfigMap| {
            object.metadata.labels = Some([("mine".to_owned(), "yes".to_owned())].into());
            object
        };
        // From a version that has both: "0" would let the server begin with an older one.
        let mut version = String::new();
        for name in ["a", "b"] {
            let made = api.create(&PostParams::default(), &label(config_map(name))).await?;
            version = made.metadata.resource_version.context("a version")?;
        }
        let params = WatchParams::default().labels("mine=yes").initial_events();
        let mut events = std::pin::pin!(api.watch(&params, &version).await?);
        let mut names = Vec::new();
        let bookmark = loop {
            match events.next().await.context("an event")?? {
                WatchEvent::Added(object) => names.push(object.metadata.name.unwrap_or_default()),
                WatchEvent::Bookmark(bookmark) => break bookmark,
                other => bail!("{other:?}"),
            }
        };
        names.sort();
        assert_eq!(names, ["a", "b"]);
        let ended = bookmark.metadata.annotations.get("k8s.io/initial-events-end");
        assert_eq!(ended.map(String::as_str), Some("true"));
        let number = |version: &str| version.parse::<u64>().expect("a number");
        assert!(number(&bookmark.metadata.resource_version) > number(&before));
        // Then come the changes.
        api.delete("a", &DeleteParams::default()).await?;
        let event = events.next().await.context("an event")??;
        let WatchEvent::Deleted(object) = event else { bail!("{event:?}") };
        assert_eq!(object.metadata.name.as_deref(), Some("a"));
        Ok(())
    })
}

#[test]
fn a_watch_ends_when_its_time_is_up() -> Result<()> {
    with_cluster(async |cluster| {
        let api: Api<ConfigMap> = Api::namespaced(cluster.client(), &cluster.namespace("timeout").await?);
        let made = api.create(&PostParams::default(), &config_map("one")).await?;
        let version = made.metadata.resource_version.context("a version")?;
        let params = WatchParams::default().timeout(1).fields("metadata.name=one");
        let events: Vec<WatchEvent<ConfigMap>> = api.watch(&params, &version).await?.try_collect().await?;
        // A bookmark may come at the end; nothing else does.
        assert!(events.iter().all(|event| matches!(event, WatchEvent::Bookmark(_))), "{events:?}");
        Ok(())
    })
}

#[test]
fn a_list_may_be_of_the_past() -> Result<()> {
    with_cluster(async |cluster| {
        let api: Api<ConfigMap> = Api::namespaced(cluster.client(), &cluster.namespace("past").await?);
        let made = api.create(&PostParams::default(), &config_map("one")).await?;
        let then = made.metadata.resource_version.context("a version")?;
        api.create(&PostParams::default(), &config_map("two")).await?;
        api.delete("one", &DeleteParams::default()).await?;
        let names = |list: kube::api::ObjectList<ConfigMap>| -> Vec<String> {
            let names = list.items.into_iter().filter_map(|object| object.metadata.name);
            names.filter(|name| name.len() == 3).collect()
        };
        let exact = ListParams::default().at(&then).matching(VersionMatch::Exact);
        assert_eq!(names(api.list(&exact).await?), ["one"]);
        let recent = ListParams::default().at(&then).matching(VersionMatch::NotOlderThan);
        let version = api.list(&recent).await?.metadata.resource_version.context("a version")?;
        assert!(version.parse::<u64>()? >= then.parse()?);
        assert_eq!(names(api.list(&ListParams::default()).await?), ["two"]);

        let nonsense = ListParams::default().continue_token("nonsense");
        assert_eq!(code(api.list(&nonsense).await).0, 400);
        let wrong = ListParams::default().fields("spec.nothing=1");
        assert_eq!(code(api.list(&wrong).await), (400, "BadRequest".into()));
        Ok(())
    })
}

#[test]
fn names_are_generated_and_checked() -> Result<()> {
    with_cluster(async |cluster| {
        let api: Api<ConfigMap> = Api::namespaced(cluster.client(), &cluster.namespace("names").await?);
        let mut object = config_map("");
        object.metadata.name = None;
        object.metadata.generate_name = Some("made-".into());
        let made: [String; 2] = [
            api.create(&PostParams::default(), &object).await?.metadata.name.context("a name")?,
            api.create(&PostParams::default(), &object).await?.metadata.name.context("a name")?,
        ];
        assert!(made[0] != made[1] && made.iter().all(|name| name.starts_with("made-") && name.len() == 10));
        assert_eq!(
            code(api.create(&PostParams::default(), &config_map("a_b")).await),
            (422, "Invalid".into())
        );
        let dry = PostParams { dry_run: true, ..PostParams::default() };
        api.create(&dry, &config_map("dry")).await?;
        assert!(api.get_opt("dry").await?.is_none());
        Ok(())
    })
}
