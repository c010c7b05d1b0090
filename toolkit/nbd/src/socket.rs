//! [`Socket`], a connection to a server.

use std::io::{self, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream, ToSocketAddrs};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::Duration;

use imgtool_core::{Error, Result};

use crate::uri::Server;
use crate::wire::broken;

/// Time to connect.
const CONNECT: Duration = Duration::from_secs(10);

/// Time that a server may take for the next bytes. Our limit: a server may have to read a slow disk first.
pub(crate) const READ: Duration = Duration::from_secs(60);

/// Addresses of a server. Its name is looked up once: a confined process can't do so any more.
#[derive(Debug)]
pub(crate) enum Endpoint {
    Tcp(Vec<SocketAddr>),
    Unix(PathBuf),
}

impl Endpoint {
    /// Looks up a server.
    ///
    /// # Errors
    /// [`imgtool_core::ErrorKind::Unavailable`] if its name is not known.
    pub(crate) fn of(server: &Server) -> Result<Self> {
        match server {
            Server::Unix(path) => Ok(Self::Unix(path.clone())),
            Server::Tcp(host, port) => {
                let unknown = |_| Error::unavailable(format!("host '{host}' is not known"));
                let found: Vec<SocketAddr> =
                    (host.as_str(), *port).to_socket_addrs().map_err(unknown)?.collect();
                Ok(Self::Tcp(found))
            }
        }
    }

    /// Connects to the server.
    ///
    /// # Errors
    /// [`imgtool_core::ErrorKind::Unavailable`] if nobody listens; I/O errors for a socket that does not
    /// exist.
    pub(crate) fn connect(&self) -> Result<Socket> {
        match self {
            Self::Unix(path) => {
                let stream = UnixStream::connect(path).map_err(refused)?;
                let timeouts = stream.set_read_timeout(Some(READ)).and(stream.set_write_timeout(Some(READ)));
                timeouts.map_err(broken)?;
                Ok(Socket::new(Stream::Unix(stream)))
            }
            Self::Tcp(addresses) => {
                let mut failure = Error::unavailable("the host has no address");
                for address in addresses {
                    match TcpStream::connect_timeout(address, CONNECT) {
                        Ok(stream) => return with_timeouts(stream).map_err(broken),
                        Err(error) => failure = refused(error),
                    }
                }
                Err(failure)
            }
        }
    }
}

fn with_timeouts(stream: TcpStream) -> io::Result<Socket> {
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(READ))?;
    stream.set_write_timeout(Some(READ))?;
    Ok(Socket::new(Stream::Tcp(stream)))
}

/// Sorts the errors of a connection: a missing socket and a missing right stay.
fn refused(error: io::Error) -> Error {
    match error.kind() {
        io::ErrorKind::NotFound | io::ErrorKind::PermissionDenied => Error::io("connect", error),
        _ => broken(error),
    }
}

/// A connection. Reads are buffered, since replies have short heads; long ones go past the buffer.
pub(crate) struct Socket(BufReader<Stream>);

enum Stream {
    Tcp(TcpStream),
    Unix(UnixStream),
}

impl Socket {
    fn new(stream: Stream) -> Self {
        Self(BufReader::new(stream))
    }

    /// Sets the time that the server may take for the next bytes.
    pub(crate) fn set_timeout(&self, time: Duration) -> Result<()> {
        let set = match self.0.get_ref() {
            Stream::Tcp(stream) => stream.set_read_timeout(Some(time)),
            Stream::Unix(stream) => stream.set_read_timeout(Some(time)),
        };
        set.map_err(broken)
    }
}

impl Read for Socket {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        self.0.read(buf)
    }
}

impl Write for Socket {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        match self.0.get_mut() {
            Stream::Tcp(stream) => stream.write(buf),
            Stream::Unix(stream) => stream.write(buf),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Read for Stream {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Tcp(stream) => stream.read(buf),
            Self::Unix(stream) => stream.read(buf),
        }
    }
}
