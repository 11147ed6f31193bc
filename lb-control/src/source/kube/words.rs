//! What errors of the API server mean to somebody who has to mend them.

use kube::{Error, core::Status};

use super::kinds::Names;
use crate::model::{Problem, causes};

/// What was tried, as RBAC calls it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verb {
    /// A list.
    List,
    /// A watch.
    Watch,
}

impl Verb {
    /// Its name.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::List => "list",
            Self::Watch => "watch",
        }
    }
}

/// What an error calls for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Remedy {
    /// The version is too old: list anew, at once.
    Relist,
    /// The kind does not exist (any more).
    Missing,
    /// A rule is missing.
    Forbidden,
    /// The server does not understand the request.
    Unsupported,
    /// Try again.
    Retry,
}

/// What to do about an error.
#[must_use]
pub fn remedy(error: &Error) -> Remedy {
    match error {
        Error::Api(status) => match status.code {
            410 => Remedy::Relist,
            // The server's versions went back behind the one that we name: what there is has to be read.
            _ if is_too_large(status) => Remedy::Relist,
            404 => Remedy::Missing,
            403 => Remedy::Forbidden,
            400 | 422 => Remedy::Unsupported,
            // A watch's status may come without a code.
            _ if status.reason == "Expired" || status.reason == "Gone" => Remedy::Relist,
            _ => Remedy::Retry,
        },
        _ => Remedy::Retry,
    }
}

/// `NewTooLargeResourceVersionError` of the API server's storage.
fn is_too_large(status: &Status) -> bool {
    let causes = status.details.iter().flat_map(|details| &details.causes);
    causes.into_iter().any(|cause| cause.reason == "ResourceVersionTooLarge")
        || status.message.contains("Too large resource version")
}

/// The problem that an error is.
#[must_use]
pub fn problem(error: &Error, verb: Verb, names: Names) -> Problem {
    match error {
        Error::Api(status) => match remedy(error) {
            Remedy::Forbidden => forbidden(verb, names, &status.message),
            Remedy::Missing => missing(names),
            _ if status.code == 401 => Problem::error(
                "the API server does not accept our credentials (401 Unauthorized): check the ServiceAccount's \
                 token, or user and certificate in the kubeconfig",
            ),
            _ => Problem::error(format!(
                "cannot {} {names}: the API server answers {} {}: {}; what is known stays in effect, and it is \
                 tried again",
                verb.name(),
                status.code,
                status.reason,
                status.message,
            )),
        },
        Error::SerdeError(error) => Problem::error(format!(
            "cannot {} {names}: the API server's answer cannot be read: {error}; what is known stays in effect, \
             and it is tried again",
            verb.name(),
        )),
        other => unreachable(&causes(other)),
    }
}

/// The problem that an error is, of a request that is about no kind.
#[must_use]
pub fn trouble(error: &Error, what: &str) -> Problem {
    match error {
        Error::Api(status) => Problem::error(format!(
            "cannot {what}: the API server answers {} {}: {}; it is tried again",
            status.code, status.reason, status.message
        )),
        other => unreachable(&causes(other)),
    }
}

fn forbidden(verb: Verb, names: Names, message: &str) -> Problem {
    Problem::error(format!(
        "RBAC does not let Pointsman {verb} {names}: add to its ClusterRole the rule apiGroups [\"{group}\"], \
         resources [\"{plural}\"], verbs [\"list\", \"watch\"] (chart and manifests of this version have it) \
         ({message})",
        verb = verb.name(),
        group = names.group,
        plural = names.plural,
    ))
}

fn missing(names: Names) -> Problem {
    let remedy = if names.group == crate::crd::GROUP {
        "install the chart `pointsman-crds`, or `kubectl apply` the files of deploy/crds; Pointsman waits for it"
    } else {
        "does the API server serve this group? Pointsman goes on asking"
    };
    Problem::error(format!("the cluster has no {names}: {remedy}"))
}

/// The API server gives no answer.
#[must_use]
pub fn unreachable(cause: &str) -> Problem {
    Problem::error(format!(
        "the API server cannot be reached ({cause}): what is known stays in effect, changes in the cluster go \
         unnoticed until it answers"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::source::kube::kinds::{Kind, Pools, Slices};

    fn api(code: u16, reason: &str) -> Error {
        Error::Api(Box::new(kube::core::Status { code, ..kube::core::Status::failure("why", reason) }))
    }

    #[test]
    fn a_missing_rule_is_named() {
        let text = problem(&api(403, "Forbidden"), Verb::Watch, Slices::NAMES).message;
        for part in
            ["watch endpointslices.discovery.k8s.io", "apiGroups [\"discovery.k8s.io\"]", "ClusterRole"]
        {
            assert!(text.contains(part), "{part}: {text}");
        }
    }

    #[test]
    fn missing_definitions_name_the_chart() {
        let text = problem(&api(404, "NotFound"), Verb::List, Pools::NAMES).message;
        assert!(text.contains("no addresspools.pointsman.dev") && text.contains("pointsman-crds"), "{text}");
    }

    #[test]
    fn remedies() {
        for (code, reason, expected) in [
            (410, "Expired", Remedy::Relist),
            (0, "Expired", Remedy::Relist),
            (0, "Gone", Remedy::Relist),
            (404, "NotFound", Remedy::Missing),
            (403, "Forbidden", Remedy::Forbidden),
            (422, "Invalid", Remedy::Unsupported),
            (400, "BadRequest", Remedy::Unsupported),
            (401, "Unauthorized", Remedy::Retry),
            (429, "TooManyRequests", Remedy::Retry),
            (500, "InternalError", Remedy::Retry),
        ] {
            assert_eq!(remedy(&api(code, reason)), expected, "{code} {reason}");
        }
        let message = "Timeout: Too large resource version: 9, current: 7";
        let status = Status::failure(message, "Timeout").with_code(504);
        assert_eq!(remedy(&Error::Api(Box::new(status))), Remedy::Relist);
    }
}
