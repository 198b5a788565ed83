//! The yardstick: Pingora's stock proxy with `upstream_peer` and nothing else. No logging, the
//! system's allocator, one worker thread, a pool large enough never to reconnect.

use crate::Failure;
use async_trait::async_trait;
use pingora::apps::HttpServerOptions;
use pingora::proxy::{ProxyHttp, ProxyServiceBuilder, Session};
use pingora::server::Server;
use pingora::server::configuration::ServerConf;
use pingora::upstreams::peer::HttpPeer;
use std::net::SocketAddr;
use std::process::ExitCode;

/// Options of `load bare`.
#[derive(clap::Args)]
pub struct Options {
    /// The address to listen on
    #[arg(long, default_value = "127.0.0.1:8001")]
    listen: SocketAddr,
    /// Where every request goes
    #[arg(long, default_value = "127.0.0.1:8000")]
    upstream: SocketAddr,
    /// Accept HTTP/2 without TLS too (this looks into the first bytes of every connection)
    #[arg(long)]
    h2c: bool,
}

struct PassThrough {
    upstream: SocketAddr,
}

#[async_trait]
impl ProxyHttp for PassThrough {
    type CTX = ();

    fn new_ctx(&self) -> Self::CTX {}

    async fn upstream_peer(&self, _session: &mut Session, _ctx: &mut Self::CTX) -> pingora::Result<Box<HttpPeer>> {
        Ok(Box::new(HttpPeer::new(self.upstream, false, String::new())))
    }
}

/// Runs the pass-through until it is killed.
pub fn command(options: &Options) -> Result<ExitCode, Failure> {
    let conf = ServerConf { threads: 1, upstream_keepalive_pool_size: 4096, ..ServerConf::default() };
    let mut server = Server::new_with_opt_and_conf(None, conf);
    server.bootstrap();
    let pass_through = PassThrough { upstream: options.upstream };
    let mut served = HttpServerOptions::default();
    served.h2c = options.h2c;
    let mut service = ProxyServiceBuilder::new(&server.configuration, pass_through).server_options(served).build();
    service.add_tcp(&options.listen.to_string());
    server.add_service(service);
    server.run_forever()
}
