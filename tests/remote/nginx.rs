//! nginx, as servers of images are: ranges, none, redirects, TLS.

use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use imgtool_testing::{assert_same, require, tempdir, text};

use super::images;
use crate::support::imgtool;

/// A running nginx, which ends with the test.
struct Nginx {
    process: Child,
    ports: [u16; 2],
}

impl Drop for Nginx {
    fn drop(&mut self) {
        // The master, which has no workers.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// Starts nginx for the files of a directory: on the first port over HTTP, on the second over TLS.
fn start(directory: &Path) -> Nginx {
    let ports = [(); 2].map(|()| TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port());
    let [plain, tls] = ports;
    let root = text(directory);
    let paths = ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"]
        .map(|name| format!("{name}_temp_path {root}/nginx-{name};"))
        .join("\n");
    let config = format!(
        "daemon off; master_process off; worker_processes 1; error_log {root}/error.log; pid {root}/nginx.pid;
        events {{ worker_connections 64; }}
        http {{
            {paths}
            access_log {root}/access.log;
            server {{
                listen 127.0.0.1:{plain};
                listen 127.0.0.1:{tls} ssl;
                ssl_certificate {root}/server.pem;
                ssl_certificate_key {root}/server.key;
                root {root};
                location /whole/ {{ alias {root}/; max_ranges 0; }}
                location /moved/ {{ rewrite ^/moved/(.*)$ /$1 redirect; }}
            }}
        }}"
    );
    std::fs::write(directory.join("nginx.conf"), config).unwrap();
    let process = Command::new("nginx")
        .args(["-c", text(&directory.join("nginx.conf")), "-p", root, "-e", &format!("{root}/error.log")])
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    // Ends the process if it does not listen, too.
    let server = Nginx { process, ports };
    for _ in 0..200 {
        if TcpStream::connect(("127.0.0.1", tls)).is_ok() {
            return server;
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    panic!("nginx does not listen: {:?}", std::fs::read_to_string(directory.join("error.log")));
}

/// Makes an authority, `ca.pem`, and a certificate of it for 127.0.0.1.
fn certificates(directory: &Path) {
    let openssl = |line: &str| {
        let run = Command::new("openssl").args(line.split(' ')).current_dir(directory).output().unwrap();
        assert!(run.status.success(), "{line}: {}", String::from_utf8_lossy(&run.stderr));
    };
    openssl("req -x509 -newkey rsa:2048 -nodes -keyout ca.key -out ca.pem -days 2 -subj /CN=authority");
    openssl("req -newkey rsa:2048 -nodes -keyout server.key -out server.csr -subj /CN=server");
    std::fs::write(directory.join("names"), "subjectAltName=IP:127.0.0.1\n").unwrap();
    openssl(
        "x509 -req -in server.csr -CA ca.pem -CAkey ca.key -CAcreateserial -out server.pem -days 2 -extfile names",
    );
}

#[test]
fn converts_from_nginx() {
    require!("nginx", "openssl");
    let dir = tempdir();
    let [raw, qcow2] = images(dir.path());
    certificates(dir.path());
    let server = start(dir.path());
    let [plain, tls] = server.ports;
    let out = dir.path().join("out.raw");
    for path in ["disk.qcow2", "moved/disk.qcow2", "whole/disk.qcow2"] {
        let url = format!("http://127.0.0.1:{plain}/{path}");
        imgtool(["convert", "--force", &url, text(&out)]).ok();
        assert_same(&raw, &out, path);
    }
    let url = format!("https://127.0.0.1:{tls}/disk.qcow2");
    imgtool(["convert", "--force", "--cacert", text(&dir.path().join("ca.pem")), &url, text(&out)]).ok();
    assert_same(&raw, &out, "tls");
    let run = imgtool(["convert", "--force", &url, text(&out)]).go();
    run.exits(1).says("not secure").says("--cacert");
    let log = std::fs::read_to_string(dir.path().join("access.log")).unwrap();
    assert_eq!(log.matches("GET /moved/").count(), 1, "{log}");
    assert_eq!(log.matches("GET /whole/").count(), 1, "{log}");
    let sent = log.lines().filter(|line| line.contains("\" 206 ")).filter_map(|line| {
        let (_, rest) = line.split_once("\" 206 ")?;
        rest.split(' ').next()?.parse::<u64>().ok()
    });
    // Three conversions: /disk.qcow2 over both, and behind the redirect.
    let (sent, stored) = (sent.sum::<u64>(), std::fs::metadata(qcow2).unwrap().len());
    assert!(sent <= 3 * (stored * 102 / 100 + (1 << 20)), "{sent} of {stored}");
}
