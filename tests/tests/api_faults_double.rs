//! What the API server double can do wrong. A real API server cannot be asked to.

use std::time::Duration;

use anyhow::{Context, Result, bail};
use futures::{StreamExt, TryStreamExt};
use k8s_openapi::api::core::v1::ConfigMap;
use kube::{
    Api, Client, Error,
    api::{ListParams, PostParams, WatchEvent, WatchParams},
};
use pointsman_tests::{
    apiserver::{ApiServer, Effect, Filter, Verb, cluster},
    lab::{Lab, is_root},
};
use serde_json::json;
use tokio::time::timeout;

/// Longer than anything takes on a busy machine.
const PATIENCE: Duration = Duration::from_secs(30);
/// How long it is looked that nothing comes.
const QUIET: Duration = Duration::from_millis(300);

fn config_map(name: &str) -> ConfigMap {
    serde_json::from_value(json!({ "metadata": { "name": name } })).expect("a ConfigMap")
}

fn run(test: impl AsyncFnOnce(&ApiServer) -> Result<()>) -> Result<()> {
    if cluster::is_real() {
        println!("only the double can do this: nothing to see in a real cluster");
        return Ok(());
    }
    let server = ApiServer::start()?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(test(&server))
}

fn api(server: &ApiServer) -> Result<Api<ConfigMap>> {
    Ok(Api::namespaced(server.client()?, "default"))
}

async fn version(api: &Api<ConfigMap>) -> Result<String> {
    api.list(&ListParams::default()).await?.metadata.resource_version.context("a version")
}

#[test]
fn requests_fail_as_often_as_told() -> Result<()> {
    run(async |server| {
        let api = api(server)?;
        let list = ListParams::default();
        let fault = server.faults().error(Filter::of("list", "configmaps"), 500, None, 2);
        for _ in 0..2 {
            let Err(Error::Api(status)) = api.list(&list).await else { bail!("no failure") };
            assert_eq!((status.code, status.reason.as_str()), (500, "InternalError"));
        }
        assert_eq!(server.faults().left(fault), 0);
        api.list(&list).await?;
        // The client itself tries again after this one.
        server.faults().error(Filter::of("list", "configmaps"), 429, Some(1), 1);
        api.list(&list).await?;
        let codes: Vec<u16> = server.requests().iter().map(|request| request.code).collect();
        assert_eq!(codes, [500, 500, 200, 429, 200]);
        Ok(())
    })
}

#[test]
fn a_watch_falls_silent_and_goes_on() -> Result<()> {
    run(async |server| {
        let api = api(server)?;
        let mut events = std::pin::pin!(api.watch(&WatchParams::default(), &version(&api).await?).await?);
        let fault = server.faults().stall(Filter::of("watch", "configmaps"));
        api.create(&PostParams::default(), &config_map("one")).await?;
        assert!(timeout(QUIET, events.next()).await.is_err());
        server.faults().lift(fault);
        let event = timeout(PATIENCE, events.next()).await?.context("an event")??;
        assert!(matches!(event, WatchEvent::Added(_)), "{event:?}");
        Ok(())
    })
}

#[test]
fn watches_are_closed_and_counted() -> Result<()> {
    run(async |server| {
        let api = api(server)?;
        let events = api.watch(&WatchParams::default(), &version(&api).await?).await?;
        api.create(&PostParams::default(), &config_map("one")).await?;
        let mut events = std::pin::pin!(events);
        events.next().await.context("an event")??;
        assert_eq!(server.open_watches("configmaps"), 1);
        server.faults().close_watches(Filter::of("watch", "services"));
        assert!(timeout(QUIET, events.next()).await.is_err());
        server.faults().close_watches(Filter::of("watch", "configmaps"));
        assert!(timeout(PATIENCE, events.next()).await?.is_none());
        assert_eq!(server.open_watches("configmaps"), 0);
        Ok(())
    })
}

#[test]
fn the_past_is_forgotten() -> Result<()> {
    run(async |server| {
        let api = api(server)?;
        let old = version(&api).await?;
        let mut open = std::pin::pin!(api.watch(&WatchParams::default(), &old).await?);
        api.create(&PostParams::default(), &config_map("one")).await?;
        open.next().await.context("an event")??;
        server.faults().compact();
        let events: Vec<WatchEvent<ConfigMap>> =
            api.watch(&WatchParams::default(), &old).await?.try_collect().await?;
        let [WatchEvent::Error(status)] = events.as_slice() else { bail!("{events:?}") };
        assert_eq!(status.code, 410);
        // As an HTTP status, on demand.
        server.faults().error(Filter::of("watch", ""), 410, None, 1);
        let Err(Error::Api(status)) = api.watch(&WatchParams::default(), &old).await.map(drop) else {
            bail!("no failure");
        };
        assert_eq!(status.code, 410);
        // Who is up to date is not concerned.
        api.create(&PostParams::default(), &config_map("two")).await?;
        let event = open.next().await.context("an event")??;
        assert!(matches!(event, WatchEvent::Added(_)), "{event:?}");
        Ok(())
    })
}

#[test]
fn it_goes_down_and_comes_back_with_everything() -> Result<()> {
    run(async |server| {
        let api = api(server)?;
        api.create(&PostParams::default(), &config_map("one")).await?;
        let mut events = std::pin::pin!(api.watch(&WatchParams::default(), &version(&api).await?).await?);
        server.faults().down();
        let ended = timeout(PATIENCE, events.next()).await?;
        assert!(ended.is_none_or(|event| event.is_err()));
        assert!(std::net::TcpStream::connect(server.address()).is_err());
        assert!(api.get("one").await.is_err());
        server.faults().up()?;
        assert_eq!(api.get("one").await?.metadata.name.as_deref(), Some("one"));
        Ok(())
    })
}

#[test]
fn versions_begin_anew_as_after_a_restore() -> Result<()> {
    run(async |server| {
        let api = api(server)?;
        let old = version(&api).await?;
        let mut events = std::pin::pin!(api.watch(&WatchParams::default(), &old).await?);
        server.faults().new_epoch(-10);
        assert!(timeout(PATIENCE, events.next()).await?.is_none());
        assert!(version(&api).await?.parse::<u64>()? < old.parse()?);
        Ok(())
    })
}

#[test]
fn answers_are_late_lost_or_never_come() -> Result<()> {
    run(async |server| {
        let api = api(server)?;
        let faults = server.faults();
        faults.add(Filter::of("create", ""), Effect::Delay { milliseconds: 50 }, Some(1));
        let begin = std::time::Instant::now();
        api.create(&PostParams::default(), &config_map("late")).await?;
        assert!(begin.elapsed() >= Duration::from_millis(50));
        // Lost before it was done, and after.
        for (effect, name, done) in [(Effect::Drop, "before", false), (Effect::DropAfter, "after", true)] {
            faults.add(Filter::of("create", "configmaps"), effect, Some(1));
            assert!(api.create(&PostParams::default(), &config_map(name)).await.is_err());
            assert_eq!(api.get_opt(name).await?.is_some(), done, "{name}");
        }
        let stall = faults.stall(Filter { name: "late".into(), ..Filter::of("get", "configmaps") });
        assert!(timeout(QUIET, api.get("late")).await.is_err());
        faults.lift(stall);
        api.get("late").await?;
        Ok(())
    })
}

#[test]
fn requests_are_written_down() -> Result<()> {
    run(async |server| {
        let api = api(server)?;
        api.create(&PostParams::default(), &config_map("one")).await?;
        let same = api.get("one").await?;
        api.replace("one", &PostParams::default(), &same).await?;
        let requests = server.requests();
        let seen: Vec<(Verb, &str, bool)> =
            requests.iter().map(|request| (request.verb, request.name.as_str(), request.changed)).collect();
        assert_eq!(seen, [(Verb::Create, "", true), (Verb::Get, "one", false), (Verb::Update, "one", false)]);
        Ok(())
    })
}

#[test]
fn faults_are_set_over_http() -> Result<()> {
    run(async |server| {
        let client: Client = server.client()?;
        let order = |body: &str| http::Request::post("/_faults").body(body.as_bytes().to_vec());
        let add = r#"{ "add": { "filter": { "verb": "get" }, "effect": { "error": { "code": 500 } } } }"#;
        client.request_text(order(add)?).await?;
        let api = api(server)?;
        let Err(Error::Api(status)) = api.get("one").await else { bail!("no failure") };
        assert_eq!(status.code, 500);
        client.request_text(order(r#""clear""#)?).await?;
        assert!(api.get_opt("one").await?.is_none());
        Ok(())
    })
}

#[test]
fn it_listens_in_network_namespaces_each_for_itself() -> Result<()> {
    if !is_root() {
        return Ok(());
    }
    run(async |server| {
        let lab = Lab::routed(0)?;
        let loopback = (std::net::Ipv4Addr::LOCALHOST, 0).into();
        let inside = server.listen(loopback, Some(&lab.edge.path()))?;
        let connect = || std::net::TcpStream::connect(inside.address()).is_ok();
        assert!(lab.edge.enter(connect)? && !lab.client.enter(connect)?);
        inside.down();
        assert!(!lab.edge.enter(connect)?);
        // The other address is not concerned.
        api(server)?.list(&ListParams::default()).await?;
        inside.up()?;
        assert!(lab.edge.enter(connect)?);
        Ok(())
    })
}
