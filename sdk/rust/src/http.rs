//! A small HTTP client for plugins, over `wasi:http`. The servers it reaches are those of `grants.http`.
//!
//! Waits for the answer: for `auth` and what runs in the background, not for `acl` or `before-store`. In native tests the
//! answers are those of [`crate::testing::respond`].

/// A request.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct HttpRequest {
    /// `GET`, `POST` …
    pub method: String,
    /// `http://host:port/path?query`, or https.
    pub url: String,
    /// Names and values.
    pub headers: Vec<(String, String)>,
    /// Empty: none.
    pub body: Vec<u8>,
    /// Milliseconds for connecting, and for each wait for an answer; 0: as the host has it, 30 s.
    pub timeout_ms: u64,
}

/// An answer.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct HttpResponse {
    /// 200, 404 …
    pub status: u16,
    /// At most 1 MiB.
    pub body: Vec<u8>,
}

impl HttpRequest {
    /// POST with this content.
    pub fn post(url: impl Into<String>, content_type: &str, body: impl Into<Vec<u8>>) -> Self {
        Self {
            method: "POST".into(),
            url: url.into(),
            headers: vec![("content-type".into(), content_type.into())],
            body: body.into(),
            timeout_ms: 0,
        }
    }

    /// Asks, and waits for the whole answer.
    ///
    /// # Errors
    /// There is none: not granted, not reachable, too late, too large.
    pub fn send(&self) -> Result<HttpResponse, String> {
        #[cfg(target_arch = "wasm32")]
        return wasi::send(self).map_err(|error| format!("{}: {error}", self.url));
        #[cfg(not(target_arch = "wasm32"))]
        crate::testing::answer_http(self)
    }
}

/// Scheme, authority and path of a URL.
#[cfg_attr(not(target_arch = "wasm32"), allow(dead_code, reason = "the stand-in needs no parts"))]
fn parts(url: &str) -> Result<(bool, &str, &str), String> {
    let (scheme, rest) = url.split_once("://").ok_or("not a URL")?;
    let is_tls = match scheme {
        "https" => true,
        "http" => false,
        _ => return Err("neither http nor https".into()),
    };
    let (authority, path) = rest.find('/').map_or((rest, "/"), |at| rest.split_at(at));
    if authority.is_empty() { Err("no host".into()) } else { Ok((is_tls, authority, path)) }
}

#[cfg(target_arch = "wasm32")]
mod wasi {
    use wasip2::http::outgoing_handler::handle;
    use wasip2::http::types::{Fields, IncomingBody, Method, OutgoingBody, OutgoingRequest, RequestOptions, Scheme};
    use wasip2::io::streams::StreamError;

    use super::{HttpRequest, HttpResponse, parts};

    const BODY_BYTES_MAX: usize = 1 << 20;
    /// What one write takes.
    const PIECE_BYTES: usize = 4096;

    fn text(what: &str) -> impl FnOnce(()) -> String + '_ {
        move |()| format!("{what} is not valid")
    }

    fn method(name: &str) -> Method {
        match name {
            "GET" => Method::Get,
            "POST" => Method::Post,
            "PUT" => Method::Put,
            "DELETE" => Method::Delete,
            "PATCH" => Method::Patch,
            other => Method::Other(other.to_owned()),
        }
    }

    pub(super) fn send(from: &HttpRequest) -> Result<HttpResponse, String> {
        let (is_tls, authority, path) = parts(&from.url)?;
        let headers: Vec<(String, Vec<u8>)> =
            from.headers.iter().map(|(name, value)| (name.clone(), value.clone().into_bytes())).collect();
        let headers = Fields::from_list(&headers).map_err(|error| format!("headers: {error}"))?;
        let request = OutgoingRequest::new(headers);
        request.set_method(&method(&from.method)).map_err(text("the method"))?;
        request.set_scheme(Some(&if is_tls { Scheme::Https } else { Scheme::Http })).map_err(text("the scheme"))?;
        request.set_authority(Some(authority)).map_err(text("the host"))?;
        request.set_path_with_query(Some(path)).map_err(text("the path"))?;
        let body = request.body().map_err(text("the body"))?;
        let options = RequestOptions::new();
        if from.timeout_ms > 0 {
            let nanoseconds = Some(from.timeout_ms * 1_000_000);
            let _ = options.set_connect_timeout(nanoseconds);
            let _ = options.set_first_byte_timeout(nanoseconds);
            let _ = options.set_between_bytes_timeout(nanoseconds);
        }
        let answer = handle(request, Some(options)).map_err(|error| error.to_string())?;
        {
            let stream = body.write().map_err(text("the body"))?;
            for piece in from.body.chunks(PIECE_BYTES) {
                stream.blocking_write_and_flush(piece).map_err(|error| error.to_string())?;
            }
        }
        OutgoingBody::finish(body, None).map_err(|error| error.to_string())?;
        answer.subscribe().block();
        let response = match answer.get() {
            Some(Ok(Ok(response))) => response,
            Some(Ok(Err(error))) => return Err(error.to_string()),
            _ => return Err("no answer".into()),
        };
        let status = response.status();
        let body = response.consume().map_err(text("the answer"))?;
        Ok(HttpResponse { status, body: read(&body)? })
    }

    fn read(body: &IncomingBody) -> Result<Vec<u8>, String> {
        let stream = body.stream().map_err(text("the answer"))?;
        let mut bytes = Vec::new();
        loop {
            match stream.blocking_read(64 * 1024) {
                Ok(piece) => bytes.extend(piece),
                Err(StreamError::Closed) => return Ok(bytes),
                Err(StreamError::LastOperationFailed(error)) => return Err(error.to_debug_string()),
            }
            if bytes.len() > BODY_BYTES_MAX {
                return Err(format!("an answer of more than {BODY_BYTES_MAX} bytes"));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls_have_parts() {
        assert_eq!(parts("https://a:1/b?c=d"), Ok((true, "a:1", "/b?c=d")));
        assert_eq!(parts("http://a"), Ok((false, "a", "/")));
        for wrong in ["a", "ftp://a/", "http:///x"] {
            assert!(parts(wrong).is_err(), "{wrong}");
        }
    }
}
