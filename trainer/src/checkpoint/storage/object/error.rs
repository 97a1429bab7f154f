//! What a failed request means to the user: one cause, what to do, and whether starting again can help.

use std::error::Error as StdError;
use std::io;

use object_store::Error;
use object_store::client::{HttpError, HttpErrorKind};

use super::connect::Server;
use crate::exit::Kind;

/// A request to an object store that failed, inside an [`io::Error`].
#[derive(Debug, Clone, thiserror::Error)]
#[error("{message}")]
pub struct ObjectError {
    /// What kind of error it is, for the exit code.
    pub kind: Kind,
    message: String,
}

impl ObjectError {
    /// Settings that cannot work.
    pub(super) fn settings(message: impl Into<String>) -> Self {
        Self { kind: Kind::Usage, message: message.into() }
    }

    /// Something that may be over at the next start.
    pub(super) fn passing(message: impl Into<String>) -> Self {
        Self { kind: Kind::Runtime, message: message.into() }
    }

    /// An object that is not what it should be.
    pub(super) fn data(message: impl Into<String>) -> Self {
        Self { kind: Kind::Data, message: message.into() }
    }

    /// The one inside an error, if it is of an object store.
    pub fn of(error: &io::Error) -> Option<&Self> {
        error.get_ref()?.downcast_ref()
    }
}

impl From<ObjectError> for io::Error {
    fn from(error: ObjectError) -> Self {
        Self::other(error)
    }
}

/// What a request for `key` came to.
pub(super) fn explain(error: &Error, server: &Server, key: &str) -> io::Error {
    let Server { bucket, endpoint, instance_credentials } = server;
    // The library's texts hold the server's answer, and no type of it that could be asked.
    let text = error.to_string();
    let code = between(&text, "<Code>", "</Code>");
    let cause = cause(error, &text);
    let settings = |message: String| ObjectError::settings(message).into();
    if *instance_credentials && (text.contains("/latest/meta-data/") || text.contains("/latest/api/token")) {
        return settings(
            "there are no credentials: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY for every rank (`mpirun -x \
             NAME` hands a variable on to other hosts), or give this machine a role"
                .into(),
        );
    }
    // Lists come without a type of their own for either.
    let status = |number: &str| text.contains(&format!("status code: {number}"));
    let refused = matches!(error, Error::PermissionDenied { .. } | Error::Unauthenticated { .. });
    if refused || status("401") || status("403") {
        return settings(format!(
            "{endpoint} refuses {key:?} in the bucket {bucket:?} ({cause}): check AWS_ACCESS_KEY_ID, \
             AWS_SECRET_ACCESS_KEY and AWS_SESSION_TOKEN, and what they may do there (read, write, list, delete)"
        ));
    }
    let lost = status("404") && !matches!(error, Error::NotFound { .. });
    match code {
        Some("NoSuchBucket") => return settings(no_bucket(server)),
        _ if lost && code.is_none_or(|code| !code.starts_with("NoSuch")) => {
            return settings(no_bucket(server));
        }
        Some("AuthorizationHeaderMalformed" | "PermanentRedirect" | "IllegalLocationConstraintException") => {
            return settings(format!(
                "the bucket {bucket:?} is in another region ({cause}): set AWS_REGION to the bucket's"
            ));
        }
        Some("InvalidRange") => {
            return io::Error::new(
                io::ErrorKind::UnexpectedEof,
                ObjectError::data(format!("the object {key} ends before")),
            );
        }
        Some("NotImplemented") => {
            return settings(format!("the server at {endpoint} cannot do what {key} needs: {cause}"));
        }
        _ => {}
    }
    match error {
        Error::NotFound { .. } => io::Error::new(
            io::ErrorKind::NotFound,
            ObjectError::data(format!("there is no object {key} in the bucket {bucket:?}")),
        ),
        Error::NotImplemented { .. } | Error::NotSupported { .. } => {
            settings(format!("the server at {endpoint} cannot do what {key} needs: {cause}"))
        }
        Error::InvalidPath { .. } | Error::UnknownConfigurationKey { .. } => settings(cause),
        _ if text.contains("incorrectly configured region") => settings(format!(
            "the bucket {bucket:?} is in another region: set AWS_REGION to the bucket's, or correct AWS_ENDPOINT_URL"
        )),
        _ => match transport(error) {
            Some(HttpErrorKind::Connect) => ObjectError::passing(format!(
                "there is no connection to {endpoint} ({cause}): check AWS_ENDPOINT_URL and the network"
            ))
            .into(),
            Some(HttpErrorKind::Timeout) => ObjectError::passing(format!(
                "{endpoint} did not answer in time for {key}: check the network, or allow it longer with AWS_TIMEOUT \
                 (such as \"300 s\")"
            ))
            .into(),
            _ => ObjectError::passing(format!("{endpoint} failed at {key} ({cause}): try again later")).into(),
        },
    }
}

fn no_bucket(Server { bucket, endpoint, .. }: &Server) -> String {
    format!(
        "there is no bucket {bucket:?} at {endpoint}: create it, or correct its name, or AWS_ENDPOINT_URL"
    )
}

/// The innermost cause in one line.
fn cause(error: &Error, text: &str) -> String {
    let answer = between(text, "<Code>", "</Code>").map(|code| {
        between(text, "<Message>", "</Message>")
            .map_or(code.to_owned(), |message| format!("{code}: {message}"))
    });
    let cause = answer.unwrap_or_else(|| chain(error).last().map_or_else(String::new, ToString::to_string));
    let line = cause.split_whitespace().collect::<Vec<_>>().join(" ");
    match line.char_indices().nth(300) {
        Some((end, _)) => format!("{}...", &line[..end]),
        None => line,
    }
}

fn chain(error: &Error) -> impl Iterator<Item = &(dyn StdError + 'static)> {
    let first: &(dyn StdError + 'static) = error;
    std::iter::successors(Some(first), |&error| error.source())
}

/// What went wrong below HTTP, if it did.
fn transport(error: &Error) -> Option<HttpErrorKind> {
    chain(error).find_map(|error| error.downcast_ref::<HttpError>()).map(HttpError::kind)
}

fn between<'a>(text: &'a str, begin: &str, end: &str) -> Option<&'a str> {
    let from = text.find(begin)? + begin.len();
    Some(&text[from..from + text[from..].find(end)?])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn server() -> Server {
        Server { bucket: "b".into(), endpoint: "http://here".into(), instance_credentials: false }
    }

    fn told(error: &Error) -> (Kind, String) {
        let error = explain(error, &server(), "run/step-00000001/manifest.json");
        let inner = ObjectError::of(&error).expect("of an object store");
        (inner.kind, inner.to_string())
    }

    #[test]
    fn the_cause_is_one_line_and_says_whether_another_start_can_help() {
        let answer = |code: &str| {
            format!(
                "Server returned non-2xx status code: <Error><Code>{code}</Code><Message>so\n it is</Message></Error>"
            )
        };
        let generic = |text: String| Error::Generic { store: "S3", source: text.into() };
        let (kind, text) = told(&Error::NotFound { path: "k".into(), source: answer("NoSuchBucket").into() });
        assert!(kind == Kind::Usage && text.contains("no bucket \"b\" at http://here"), "{text}");
        let (kind, text) =
            told(&Error::PermissionDenied { path: "k".into(), source: answer("AccessDenied").into() });
        assert!(kind == Kind::Usage && text.contains("AccessDenied: so it is"), "{text}");
        let (kind, text) = told(&generic(answer("SlowDown")));
        assert!(
            kind == Kind::Runtime && text.contains("SlowDown: so it is") && !text.contains('\n'),
            "{text}"
        );
        let (kind, text) = told(&generic(answer("AuthorizationHeaderMalformed")));
        assert!(kind == Kind::Usage && text.contains("AWS_REGION"), "{text}");
        let missing = Error::NotFound { path: "k".into(), source: answer("NoSuchKey").into() };
        let error = explain(&missing, &server(), "k");
        assert_eq!(error.kind(), io::ErrorKind::NotFound);
        assert_eq!(told(&missing).0, Kind::Data);
    }
}
