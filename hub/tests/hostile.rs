//! Whatever a server answers, there is a typed error in the end, and no panic.

use std::io::{Read as _, Write as _};
use std::net::TcpListener;
use std::thread;
use std::time::Duration;

use crate::common::{client_of, noise, settings};
use sluice_hub::{Client, HubError, Patience};

/// A server that gives each connection the next of these answers, and then the last one.
fn server(answers: Vec<Vec<u8>>) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = format!("http://{}", listener.local_addr().unwrap());
    thread::spawn(move || {
        for (next, mut stream) in listener.incoming().flatten().enumerate() {
            let _ = stream.read(&mut [0; 4096]);
            let _ = stream.write_all(&answers[next.min(answers.len() - 1)]);
        }
    });
    address
}

fn answer(status: &str, headers: &str, body: &[u8]) -> Vec<u8> {
    let head = format!("HTTP/1.1 {status}\r\nContent-Length: {}\r\nConnection: close\r\n{headers}\r\n", body.len());
    [head.as_bytes(), body].concat()
}

fn json(body: &str) -> Vec<u8> {
    answer("200 OK", "", body.as_bytes())
}

const COMMIT: &str = "0123456789012345678901234567890123456789";

#[test]
fn strange_answers_are_errors() {
    let revision = json(&format!("{{\"sha\":\"{COMMIT}\",\"siblings\":[]}}"));
    let tree = |body: &str| vec![revision.clone(), json(body)];
    let cases: Vec<(Vec<Vec<u8>>, &str)> = vec![
        (vec![noise(500, 1)], "times in a row"),
        (vec![Vec::new()], "times in a row"),
        (vec![json("{")], "no JSON"),
        (vec![json("[]")], "not understood"),
        (vec![json("{}")], "names no commit"),
        (vec![json("{\"sha\":\"main\"}")], "names no commit"),
        (vec![json("{\"sha\":\"../../../etc/../../../../../../../../../../../\"}")], "names no commit"),
        (tree("{}"), "not understood"),
        (tree("[{\"type\":\"file\",\"path\":\"a\\u001b[2J\",\"oid\":\"\",\"size\":1}]"), "taken for something else"),
        (tree("[{\"type\":\"file\",\"path\":\"a\\n/b\",\"oid\":\"\",\"size\":1}]"), "taken for something else"),
        (tree("[{\"type\":\"file\",\"path\":\"x\",\"lfs\":{\"oid\":\"zz\",\"size\":1}}]"), "no digest"),
        (tree("[{\"type\":\"file\",\"path\":\"x\",\"oid\":\"\",\"size\":-1}]"), "not understood"),
        (vec![answer("302 Found", "Location: /round\r\n", b"")], "another address"),
        (vec![answer("302 Found", "Location: ftp://x\r\n", b"")], "no address"),
        (vec![answer("302 Found", "Location: \u{1}\r\n", b"")], ""),
        (vec![answer("302 Found", "Location: file:///etc/passwd\r\n", b"")], "no address"),
        (vec![answer("200 OK", "Content-Encoding: gzip\r\n", b"{}")], "compresses"),
        (vec![answer("403 Forbidden", "", b"")], "refuses to show it"),
        (vec![answer("418 Teapot", "", b"")], "418"),
        (vec![answer("451 X", "X-Error-Message: \u{1b}[2J\r\n", b"")], ""),
        (vec![answer("429 X", "Retry-After: 99999999999999999999\r\n", b"")], "refuses further requests"),
        (vec![answer("429 X", "Retry-After: 18446744073709551615\r\n", b"")], "refuses further requests"),
        (vec![answer("429 X", "Retry-After: Fri, 31 Dec 9999 23:59:59 GMT\r\n", b"")], "asks for a pause"),
        (vec![revision.clone(), answer("200 OK", "Link: <http://x>; rel=\"next\"\r\n", b"[]")], "strange address"),
        (vec![revision.clone(), answer("200 OK", "Link: </api/again>; rel=\"next\"\r\n", b"[]")], "pages"),
    ];
    for (answers, words) in cases {
        let shown = String::from_utf8_lossy(&answers.concat()).into_owned();
        let error = client_of(&server(answers), None).snapshot("a/b", "main").unwrap_err().to_string();
        assert!(error.contains(words), "{words:?}: {error}\n{shown}");
    }
}

/// A server that gives an answer byte by byte, as long as anybody listens.
fn slowly(bytes: &'static [u8], pause: Duration) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = format!("http://{}", listener.local_addr().unwrap());
    thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            thread::spawn(move || {
                let _ = stream.set_nodelay(true);
                let _ = stream.read(&mut [0; 4096]);
                let _ = stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n");
                for byte in bytes.iter().cycle() {
                    if stream.write_all(&[*byte]).is_err() {
                        return;
                    }
                    thread::sleep(pause);
                }
            });
        }
    });
    address
}

/// A byte now and then is no answer, however long that goes on.
#[test]
fn a_server_that_hardly_answers_is_left_alone_in_the_end() {
    let patience = Patience {
        attempts: 3,
        first_pause: Duration::from_millis(1),
        silence: Duration::from_millis(500),
        slowest: 100_000,
        ..Patience::default()
    };
    let address = slowly(b" ", Duration::from_millis(5));
    let client = Client::with_patience(settings(&address, None), patience, None).unwrap();
    let error = client.snapshot("a/b", "main").unwrap_err();
    assert!(matches!(error, HubError::Unreachable { attempts: 3, .. }), "{error}");
}

#[test]
fn noise_is_never_a_repository() {
    for seed in 0..40 {
        let len = 1 + seed as usize * 37 % 600;
        let mut bytes = noise(len, seed);
        if seed % 2 == 0 {
            bytes = answer("200 OK", "", &bytes);
        }
        client_of(&server(vec![bytes]), None).snapshot("a/b", "main").unwrap_err();
    }
}
