//! What an `s3://` URL names, and the connection to it.

use std::sync::{Arc, OnceLock};
use std::time::Duration;

use object_store::aws::{AmazonS3Builder, AmazonS3ConfigKey};
use object_store::multipart::MultipartStore;
use object_store::path::Path as Key;
use object_store::{BackoffConfig, ClientConfigKey, ObjectStore, RetryConfig};
use tokio::runtime::Handle;

use super::error::ObjectError;

/// What the storage needs of a store.
pub(crate) trait Backend: ObjectStore + MultipartStore {}

impl<T: ObjectStore + MultipartStore> Backend for T {}

/// What messages say of the other side.
#[derive(Debug, Clone)]
pub(super) struct Server {
    pub(super) bucket: String,
    pub(super) endpoint: String,
    /// Whether credentials are asked of the machine, because nobody has given any.
    pub(super) instance_credentials: bool,
}

/// The bucket and the prefix of a URL without its `s3://`.
///
/// # Errors
/// Says what is wrong with it.
pub(super) fn parse(rest: &str) -> Result<(String, Key), String> {
    let (bucket, prefix) = rest.split_once('/').unwrap_or((rest, ""));
    let known = |b: u8| b.is_ascii_alphanumeric() || b"-._".contains(&b);
    if bucket.is_empty() || !bucket.bytes().all(known) {
        return Err("it must be s3://BUCKET/PREFIX, with a bucket's name of letters, digits, '-', '.'".into());
    }
    if prefix.starts_with('/') {
        return Err("its prefix must not begin with a second '/'".into());
    }
    let prefix =
        Key::parse(prefix.trim_end_matches('/')).map_err(|e| format!("its prefix cannot be: {e}"))?;
    Ok((bucket.to_owned(), prefix))
}

/// Connects to a bucket as the environment's `AWS_*` variables say. No request is made.
///
/// # Errors
/// The variables do not fit together.
pub(super) fn connect(bucket: &str) -> (Server, Result<Arc<dyn Backend>, ObjectError>) {
    use AmazonS3ConfigKey as Setting;
    let mut builder = AmazonS3Builder::from_env().with_bucket_name(bucket);
    let value = |builder: &AmazonS3Builder, key| builder.get_config_value(&key);
    let given = value(&builder, Setting::S3Endpoint).or_else(|| value(&builder, Setting::Endpoint));
    let instance_credentials = [
        Setting::AccessKeyId,
        Setting::SecretAccessKey,
        Setting::WebIdentityTokenFile,
        Setting::ContainerCredentialsRelativeUri,
        Setting::ContainerCredentialsFullUri,
    ]
    .into_iter()
    .all(|key| value(&builder, key).is_none());
    let region = value(&builder, Setting::Region).unwrap_or_else(|| "us-east-1".to_owned());
    let server = Server {
        bucket: bucket.to_owned(),
        endpoint: given.clone().unwrap_or_else(|| format!("https://s3.{region}.amazonaws.com")),
        instance_credentials,
    };
    let may_be_plain = value(&builder, Setting::Client(ClientConfigKey::AllowHttp));
    if let Some(endpoint) = given.filter(|endpoint| endpoint.starts_with("http://"))
        && !may_be_plain.is_some_and(|allowed| ["true", "1", "yes", "y", "on"].contains(&allowed.as_str()))
    {
        let message = format!(
            "AWS_ENDPOINT_URL = {endpoint} is not encrypted: set AWS_ALLOW_HTTP=true if it may be so"
        );
        return (server, Err(ObjectError::settings(message)));
    }
    // A part of 16 MiB passes in 90 s at 1.5 Mbit/s; a host that does not answer is known after 5.
    for (key, default) in [(ClientConfigKey::Timeout, "90 s"), (ClientConfigKey::ConnectTimeout, "5 s")] {
        if std::env::var_os(format!("AWS_{}", key.as_ref().to_ascii_uppercase())).is_none() {
            builder = builder.with_config(Setting::Client(key), default);
        }
    }
    // A server that is being restarted is back within this; what is gone is told after some 10 s.
    let backoff = BackoffConfig {
        init_backoff: Duration::from_millis(200),
        max_backoff: Duration::from_secs(4),
        base: 2.0,
    };
    let retry = RetryConfig { backoff, max_retries: 6, retry_timeout: Duration::from_secs(240) };
    // The process may have a provider already, which is as good.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let store = builder.with_retry(retry).build().map_err(|error| {
        ObjectError::settings(format!("the AWS_* environment variables cannot be used: {error}"))
    });
    (server, store.map(|store| Arc::new(store) as Arc<dyn Backend>))
}

/// Nice value of the thread that talks to the servers: as the thread that writes checkpoints, it must not take a core
/// from computing threads for encryption and checksums.
const NICE: i32 = 10;

/// The runtime on which all requests of this process live. A thread of its own drives it all the time, so that uploads
/// go on, and idle connections are noticed to have closed, while nobody waits for a request.
///
/// # Errors
/// The system has no thread or no descriptors left.
pub(super) fn runtime() -> Result<Handle, ObjectError> {
    static RUNTIME: OnceLock<Result<Handle, ObjectError>> = OnceLock::new();
    RUNTIME
        .get_or_init(|| start().map_err(|e| ObjectError::passing(format!("cannot start a thread: {e}"))))
        .clone()
}

fn start() -> std::io::Result<Handle> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let handle = runtime.handle().clone();
    std::thread::Builder::new().name("object-store".into()).spawn(move || {
        // On Linux a thread's own. Without it things are as they were.
        let _ = rustix::process::nice(NICE);
        runtime.block_on(std::future::pending::<()>());
    })?;
    Ok(handle)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_url_is_a_bucket_and_a_prefix() {
        for (url, bucket, prefix) in [
            ("bucket", "bucket", ""),
            ("bucket/", "bucket", ""),
            ("bucket/runs/one", "bucket", "runs/one"),
            ("my.bucket-2/one/", "my.bucket-2", "one"),
        ] {
            assert_eq!(parse(url), Ok((bucket.to_owned(), Key::from(prefix))), "{url}");
        }
        for url in ["", "/prefix", "a b/c", "bucket//c", "bucket/../c"] {
            assert!(parse(url).is_err(), "{url}");
        }
    }
}
