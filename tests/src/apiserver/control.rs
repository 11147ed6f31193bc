//! Faults over HTTP, for tests whose server is another process, and by hand.

use std::sync::Arc;

use hyper::{Method, body::Bytes};
use serde::Deserialize;
use serde_json::json;

use super::{
    failure::{Failure, Outcome},
    faults::{Effect, Filter},
    server::{Reply, Server},
};

/// Where all of this is.
pub const PREFIX: &str = "/_";

/// What `POST /_faults` takes.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
enum Order {
    /// `{"add": {"filter": {"verb": "list"}, "effect": {"error": {"code": 500}}, "times": 3}}`
    Add {
        #[serde(default)]
        filter: Filter,
        effect: Effect,
        #[serde(default)]
        times: Option<u32>,
    },
    /// `{"lift": 1}`
    Lift(u64),
    /// `"clear"`
    Clear,
    /// `{"closeWatches": {"resource": "services"}}`
    CloseWatches(Filter),
    /// `"compact"`
    Compact,
}

/// Answers a request to the server itself.
///
/// # Errors
/// When it is none that is known.
pub fn answer(server: &Arc<Server>, method: &Method, path: &str, body: &Bytes) -> Outcome<Reply> {
    match (method.as_str(), path) {
        ("POST", "/_faults") => {
            let order =
                serde_json::from_slice(body).map_err(|error| Failure::bad_request(error.to_string()))?;
            let id = execute(server, order);
            server.wake();
            Ok(Reply::json(200, &json!({ "id": id })))
        }
        ("GET", "/_requests") => {
            let requests = serde_json::to_value(server.record.all()).unwrap_or_default();
            Ok(Reply::json(200, &requests))
        }
        ("DELETE", "/_requests") => {
            server.record.clear();
            Ok(Reply::json(200, &json!({})))
        }
        _ => Err(Failure::no_such_path()),
    }
}

fn execute(server: &Arc<Server>, order: Order) -> Option<u64> {
    match order {
        Order::Add { filter, effect, times } => return Some(server.faults.add(filter, effect, times)),
        Order::Lift(id) => server.faults.lift(id),
        Order::Clear => server.faults.clear(),
        Order::CloseWatches(filter) => server.faults.close_watches(filter),
        Order::Compact => server.store().compact(),
    }
    None
}
