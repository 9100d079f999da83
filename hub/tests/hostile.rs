//! Whatever a server answers, there is a typed error in the end, and no panic.

mod common;

use std::io::{Read as _, Write as _};
use std::net::TcpListener;
use std::thread;

use common::{client_of, noise};

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
        (tree("[{\"type\":\"file\",\"path\":\"x\",\"lfs\":{\"oid\":\"zz\",\"size\":1}}]"), "no digest"),
        (tree("[{\"type\":\"file\",\"path\":\"x\",\"oid\":\"\",\"size\":-1}]"), "not understood"),
        (vec![answer("302 Found", "Location: /round\r\n", b"")], "another address"),
        (vec![answer("302 Found", "Location: ftp://x\r\n", b"")], "no address"),
        (vec![answer("302 Found", "Location: \u{1}\r\n", b"")], ""),
        (vec![answer("418 Teapot", "", b"")], "418"),
        (vec![answer("451 X", "X-Error-Message: \u{1b}[2J\r\n", b"")], ""),
        (vec![answer("429 X", "Retry-After: 99999999999999999999\r\n", b"")], "refuses further requests"),
        (vec![answer("429 X", "Retry-After: 18446744073709551615\r\n", b"")], "refuses further requests"),
        (vec![revision.clone(), answer("200 OK", "Link: <http://x>; rel=\"next\"\r\n", b"[]")], "strange address"),
        (vec![revision.clone(), answer("200 OK", "Link: </api/again>; rel=\"next\"\r\n", b"[]")], "pages"),
    ];
    for (answers, words) in cases {
        let shown = String::from_utf8_lossy(&answers.concat()).into_owned();
        let error = client_of(&server(answers), None).snapshot("a/b", "main").unwrap_err().to_string();
        assert!(error.contains(words), "{words:?}: {error}\n{shown}");
    }
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
