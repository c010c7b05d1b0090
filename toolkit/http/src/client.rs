//! [`Client`], which sends the requests for one source: over TLS and proxies, with the credentials for its
//! server.

use std::fmt;
use std::sync::OnceLock;
use std::time::Duration;

use imgtool_core::{Error, Result};
use rustls::pki_types::CertificateDer;
use ureq::http::header::{self, HeaderMap, HeaderValue};
use ureq::http::{Request, Response, StatusCode};
use ureq::tls::{Certificate, RootCerts, TlsConfig};
use ureq::unversioned::transport::DefaultConnector;
use ureq::{Agent, Body, Proxy};

use crate::address::Guard;
use crate::settings::Settings;
use crate::target::Target;

/// Time to look up a name, to connect (TLS included) and until an answer begins. Our limits: servers of
/// object stores answer within a second.
const RESOLVE: Duration = Duration::from_secs(10);
const CONNECT: Duration = Duration::from_secs(20);

/// Time that a server may take for the next bytes. There is no limit for a whole transfer, which may be long.
const READ: Duration = Duration::from_secs(30);

/// Maximum length of the headers of an answer in bytes. Our limit: real ones have 1 to 2 KiB.
const MAX_HEADERS: usize = 64 << 10;

/// Maximum number of redirects. Our limit, as of browsers' half: mirrors take one or two.
const MAX_REDIRECTS: usize = 10;

/// Time after which an unused connection is closed: servers close theirs after 5 to 75 s.
const MAX_IDLE: Duration = Duration::from_secs(15);

/// Reason why a request gave no usable answer.
#[derive(Debug)]
pub(crate) enum Failure {
    /// The network or the server failed, and may work again.
    Passing {
        /// What failed.
        error: Error,
        /// Time to wait, if the server names one.
        wait: Option<Duration>,
    },
    /// The server refuses the URL: a redirect may have ended, or a signature expired.
    Denied(StatusCode),
    /// Another try fails as well.
    Final(Error),
}

impl Failure {
    /// Creates a failure that may pass.
    pub(crate) fn passing(message: impl Into<String>) -> Self {
        Self::Passing { error: Error::unavailable(message), wait: None }
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self::Final(error)
    }
}

/// Sends the requests for one source.
pub(crate) struct Client {
    settings: Settings,
    /// URL that the user named.
    origin: Target,
    authorization: Option<HeaderValue>,
    guard: Guard,
    /// For http and https, which may have different proxies.
    agents: [OnceLock<Agent>; 2],
    concurrency: usize,
}

impl fmt::Debug for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Client").field("origin", &self.origin).finish_non_exhaustive()
    }
}

impl Client {
    /// Creates a client for the URL that the user named; at most `concurrency` requests run at once.
    ///
    /// # Errors
    /// [`imgtool_core::ErrorKind::Usage`] for an invalid URL, or another host than that of the headers.
    pub(crate) fn new(url: &str, settings: &Settings, concurrency: usize) -> Result<Self> {
        let (origin, authorization) = Target::parse(url)?;
        let guard = Guard::default();
        guard.trust(origin.host());
        let authorization = authorization.as_deref().and_then(|text| HeaderValue::from_str(text).ok());
        let authorization = authorization.map(|mut value| {
            value.set_sensitive(true);
            value
        });
        settings.bind(origin.host())?;
        let settings = settings.clone();
        Ok(Self { settings, origin, authorization, guard, agents: Default::default(), concurrency })
    }

    /// Returns the URL that the user named.
    pub(crate) fn origin(&self) -> &Target {
        &self.origin
    }

    /// Sends a request and follows its redirects. Returns the answer, which is no redirect, and its URL.
    pub(crate) fn follow(&self, headers: &HeaderMap) -> Result<(Response<Body>, Target), Failure> {
        let mut target = self.origin.clone();
        for _ in 0..=MAX_REDIRECTS {
            let response = self.get(&target, headers)?;
            let Some(location) = redirect(&response) else { return Ok((response, target)) };
            target = target.redirected(location)?;
            self.guard.check_redirect(target.uri())?;
        }
        Err(Error::limit(format!("more than {MAX_REDIRECTS} redirects")).into())
    }

    /// Sends one request, without redirects.
    pub(crate) fn get(&self, target: &Target, headers: &HeaderMap) -> Result<Response<Body>, Failure> {
        let mut request = Request::builder().method("GET").uri(target.uri().clone());
        if let Some(all) = request.headers_mut() {
            all.extend(headers.clone());
            // A compressed answer would have other bytes at other positions.
            all.insert(header::ACCEPT_ENCODING, HeaderValue::from_static("identity"));
            if self.origin.shares_credentials_with(target) {
                all.extend(self.authorization.clone().map(|value| (header::AUTHORIZATION, value)));
                all.extend(self.settings.headers().clone());
            }
        }
        let request = request.body(()).map_err(|_| Error::usage("is not a valid URL"))?;
        let response = self.agent(target.is_tls())?.run(request).map_err(failure)?;
        match response.status() {
            StatusCode::OK | StatusCode::PARTIAL_CONTENT => {
                check_encoding(response.headers())?;
                Ok(response)
            }
            status @ (StatusCode::REQUEST_TIMEOUT | StatusCode::TOO_MANY_REQUESTS) => {
                Err(busy(status, &response))
            }
            status if status.is_server_error() && status != StatusCode::NOT_IMPLEMENTED => {
                Err(busy(status, &response))
            }
            _ => Ok(response),
        }
    }

    fn agent(&self, is_tls: bool) -> Result<&Agent> {
        let agent = &self.agents[usize::from(is_tls)];
        if let Some(agent) = agent.get() {
            return Ok(agent);
        }
        let made = self.make_agent(is_tls)?;
        Ok(agent.get_or_init(|| made))
    }

    fn make_agent(&self, is_tls: bool) -> Result<Agent> {
        let proxy = proxy(is_tls)?;
        if let Some(proxy) = &proxy {
            self.guard.trust_proxy(proxy.host(), proxy.port());
        }
        let needs_tls =
            is_tls || proxy.as_ref().is_some_and(|proxy| proxy.uri().scheme_str() == Some("https"));
        let tls = match needs_tls {
            true => tls(&self.settings)?,
            false => TlsConfig::default(),
        };
        let config = Agent::config_builder()
            .http_status_as_error(false)
            .max_redirects(0)
            .max_redirects_will_error(false)
            .proxy(proxy)
            .tls_config(tls)
            .user_agent(concat!("imgtool/", env!("CARGO_PKG_VERSION")))
            .max_response_header_size(MAX_HEADERS)
            .max_idle_connections(self.concurrency)
            .max_idle_connections_per_host(self.concurrency)
            .max_idle_age(MAX_IDLE)
            .timeout_resolve(Some(RESOLVE))
            .timeout_connect(Some(CONNECT))
            .timeout_send_request(Some(READ))
            .timeout_recv_response(Some(READ))
            .timeout_per_read(Some(READ))
            .build();
        Ok(Agent::with_parts(config, DefaultConnector::default(), self.guard.clone()))
    }
}

/// Returns where an answer redirects to.
fn redirect(response: &Response<Body>) -> Option<&str> {
    let is_redirect = matches!(response.status().as_u16(), 301 | 302 | 303 | 307 | 308);
    let location = response.headers().get(header::LOCATION).filter(|_| is_redirect)?;
    // The bytes of a header may be UTF-8, which `escape` of the target encodes.
    std::str::from_utf8(location.as_bytes()).ok()
}

/// Returns the failure of a server that can't answer now.
fn busy(status: StatusCode, response: &Response<Body>) -> Failure {
    let wait = response.headers().get(header::RETRY_AFTER).and_then(|value| value.to_str().ok());
    let wait = wait.and_then(|text| text.trim().parse().ok()).map(Duration::from_secs);
    Failure::Passing { error: Error::unavailable(format!("the server answers {}", named(status))), wait }
}

/// Returns the number and name of a status.
pub(crate) fn named(status: StatusCode) -> String {
    match status.canonical_reason() {
        Some(name) => format!("{} {name}", status.as_u16()),
        None => status.as_u16().to_string(),
    }
}

/// Refuses an encoded answer, for which nobody asked: its positions are not those of the object.
fn check_encoding(headers: &HeaderMap) -> Result<()> {
    let encoding = headers.get(header::CONTENT_ENCODING).map(HeaderValue::as_bytes).unwrap_or_default();
    if encoding.is_empty() || encoding.eq_ignore_ascii_case(b"identity") {
        return Ok(());
    }
    let name = String::from_utf8_lossy(encoding);
    Err(Error::unsupported(format!(
        "the server encodes its answer ({name}), although that was not asked for"
    ))
    .hint("store the file on the server without Content-Encoding"))
}

/// Returns the settings of TLS: the certificates of the system and those of the user.
fn tls(settings: &Settings) -> Result<TlsConfig> {
    let found = rustls_native_certs::load_native_certs();
    let system = found.certs.iter().map(CertificateDer::as_ref);
    let all: Vec<Certificate<'static>> = system
        .chain(settings.roots().iter().map(Vec::as_slice))
        .map(|der| Certificate::from_der(der).to_owned())
        .collect();
    if all.is_empty() {
        return Err(Error::refused("this system has no certificates of authorities, and https needs them")
            .hint("install them (package ca-certificates), or name a file with the certificate of the authority"));
    }
    let provider = std::sync::Arc::new(rustls::crypto::ring::default_provider());
    Ok(TlsConfig::builder()
        .root_certs(RootCerts::new_with_certs(&all))
        .unversioned_rustls_crypto_provider(provider)
        .build())
}

/// Returns the proxy that the environment names, as for curl: the upper case of `http_proxy` has no effect,
/// since a web server sets it from a header of a request (CVE-2016-5385).
///
/// # Errors
/// [`imgtool_core::ErrorKind::Usage`] if it is no URL of a proxy. The error does not contain it.
fn proxy(is_tls: bool) -> Result<Option<Proxy>> {
    let names: &[&str] = match is_tls {
        true => &["https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"],
        false => &["http_proxy", "all_proxy", "ALL_PROXY"],
    };
    let value = |name: &&str| std::env::var(name).ok().filter(|value| !value.is_empty());
    let Some((name, url)) = names.iter().find_map(|name| Some((*name, value(name)?))) else {
        return Ok(None);
    };
    let invalid = || {
        Error::usage(format!("the environment variable {name} is not the URL of a proxy"))
            .hint("expected http://HOST:PORT or https://HOST:PORT")
    };
    let parsed = Proxy::new(&url).map_err(|_| invalid())?;
    let mut builder = Proxy::builder(parsed.protocol()).host(parsed.host()).port(parsed.port());
    if let Some(user) = parsed.username() {
        builder = builder.username(user);
    }
    if let Some(password) = parsed.password() {
        builder = builder.password(password);
    }
    let exempt = value(&"no_proxy").or_else(|| value(&"NO_PROXY")).unwrap_or_default();
    let builder = exempt.split(',').fold(builder, |builder, host| builder.no_proxy(host.trim()));
    builder.build().map(Some).map_err(|_| invalid())
}

/// Sorts the errors of a request. The texts of the client may contain URLs, so none is passed on.
fn failure(error: ureq::Error) -> Failure {
    match error {
        ureq::Error::Io(error) => io_failure(error),
        ureq::Error::Timeout(_) => Failure::passing("the server does not answer in time"),
        ureq::Error::ConnectionFailed => Failure::passing("the connection failed"),
        ureq::Error::HostNotFound => Failure::passing("the host is not known"),
        ureq::Error::Rustls(error) => Failure::Final(insecure(&error)),
        ureq::Error::ConnectProxyFailed(_) => {
            Failure::Final(Error::refused("the proxy does not connect to the server"))
        }
        _ => Failure::Final(Error::malformed("the server does not answer as HTTP demands")),
    }
}

/// Sorts the errors of a connection: those of our own rules and of certificates stay.
pub(crate) fn io_failure(error: std::io::Error) -> Failure {
    let inner = error.get_ref();
    if inner.is_some_and(|inner| inner.is::<Error>()) {
        let error = Error::io("connect", error);
        return match error.kind() {
            imgtool_core::ErrorKind::Unavailable => Failure::Passing { error, wait: None },
            _ => Failure::Final(error),
        };
    }
    if let Some(error) = inner.and_then(|inner| inner.downcast_ref::<rustls::Error>()) {
        return Failure::Final(insecure(error));
    }
    if let Some(inner) = inner.and_then(|inner| inner.downcast_ref::<ureq::Error>()) {
        return match inner {
            ureq::Error::Timeout(_) => Failure::passing("the server does not answer in time"),
            ureq::Error::Rustls(error) => Failure::Final(insecure(error)),
            _ => Failure::passing("the connection broke"),
        };
    }
    match error.kind() {
        // The confinement of the program, or a firewall.
        std::io::ErrorKind::PermissionDenied => Failure::Final(Error::io("connect", error)),
        kind => Failure::passing(format!("the connection failed: {kind}")),
    }
}

/// Words an error of TLS.
fn insecure(error: &rustls::Error) -> Error {
    let failed = Error::refused(format!("the connection is not secure: {error}"));
    match error {
        rustls::Error::InvalidCertificate(_) => failed.remedied_by(imgtool_core::Remedy::TrustAuthority),
        _ => failed,
    }
}
