//! Objects that cannot be taken as they are, so that people can be told at the object itself.

use super::ObjectRef;

/// Kind, as in `Service`, and name of an object.
pub type KindAndName = (&'static str, ObjectRef);

/// An object that stays as it last was, or is ignored, because something in it cannot be read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unreadable {
    /// Its `apiVersion`, as in `v1`.
    pub api_version: String,
    /// Its kind.
    pub kind: &'static str,
    /// Its name.
    pub object: ObjectRef,
    /// Its identity.
    pub uid: String,
    /// When that is our concern.
    pub concern: Concern,
    /// What cannot be read, each with its field.
    pub reasons: Vec<String>,
}

/// When an object that cannot be read is our concern: about those of others we say nothing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Concern {
    /// Always: it was written for us, or asks for what we do.
    Always,
    /// Never: a Service of another type, for example.
    Never,
    /// If we serve this `loadBalancerClass`; `None` is a Service without one.
    Class(Option<String>),
    /// If this Service is ours.
    Of(ObjectRef),
}
