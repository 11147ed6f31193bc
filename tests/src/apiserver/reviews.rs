//! Kinds that are asked and not stored: SelfSubjectAccessReview, TokenRequest.

use serde_json::Value;

use super::{access::User, call::Call, failure::Outcome, server::Server, store::Store};

/// The answer to a question; `None` when the request is none.
///
/// # Errors
/// When the question is malformed.
pub fn answer(_server: &Server, _store: &Store, _call: &Call, _user: &User) -> Outcome<Option<Value>> {
    Ok(None)
}
