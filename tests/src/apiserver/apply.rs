//! Server-side apply.

use super::{
    call::Call,
    failure::Outcome,
    objects::{self, Write, Written},
    patch,
    store::{Key, Store},
};

/// Applies what a manager wants to an object, or creates it.
///
/// # Errors
/// When others manage what it would change, or the object is invalid.
pub fn apply(store: &mut Store, mut write: Write, key: &Key, call: &Call) -> Outcome<Written> {
    let config = call.object()?;
    write.manager.apply = Some(call.query.is("force"));
    match store.get(&write.kind.storage, key) {
        None => objects::create(store, &write, key, config),
        Some(old) => {
            let mut new = serde_json::Value::clone(&old);
            patch::merge(&mut new, &config);
            objects::replace(store, &write, key, new)
        }
    }
}
