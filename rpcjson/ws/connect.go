package ws

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/coder/websocket"

	"github.com/slotota/ota"
	"github.com/slotota/ota/internal/link"
	"github.com/slotota/ota/rpcjson"
)

// Defaults of ConnectOptions, those of the original (mongoose-os-libs/rpc-common,
// mos.yml, rpc.ws.reconnect_interval_min and _max).
const (
	DefaultMinDelay = time.Second
	DefaultMaxDelay = time.Minute
)

// ConnectOptions configure [Connect]. The zero value is safe.
type ConnectOptions struct {
	Dial  DialOptions
	Serve Options // MaxConns and IdleTimeout have no effect
	// MinDelay and MaxDelay bound the pause before another attempt to connect.
	// It doubles with each, and is random within that. A connection that
	// lasted for MaxDelay lets it start anew. 0 means DefaultMinDelay and
	// DefaultMaxDelay.
	MinDelay, MaxDelay time.Duration
}

// Connect connects to the server at rawURL and serves its calls, and does so again
// whenever the connection breaks, until ctx ends. It returns the cause of ctx,
// [rpcjson.ErrClosed] at the first call after srv has been closed, or at once an
// error that wraps [ota.ErrInvalid]. o may be nil.
//
// URLs are those of [Dial]. The server must know the device by the URL, or by
// what is in the handshake; what it may do the [rpcjson.Authorizer] decides, which
// sees the channel WS_out. Frames that cannot be understood are ignored.
func Connect(ctx context.Context, srv *rpcjson.Server, rawURL string, o *ConnectOptions) error {
	var opts ConnectOptions
	if o != nil {
		opts = *o
	}
	if opts.MinDelay <= 0 {
		opts.MinDelay = DefaultMinDelay
	}
	if opts.MaxDelay <= 0 {
		opts.MaxDelay = max(DefaultMaxDelay, opts.MinDelay)
	}
	if opts.MaxDelay < opts.MinDelay {
		return fmt.Errorf("ws: MaxDelay %v: need at least MinDelay %v: %w", opts.MaxDelay, opts.MinDelay, ota.ErrInvalid)
	}
	opts.Serve = opts.Serve.complete()
	d, err := newDialer(rawURL, &opts.Dial, "json-rpc")
	if err != nil {
		return err
	}
	log := opts.Serve.Logger
	bufs := &link.Buffers{}
	once := func() error {
		c, _, err := d.dial(ctx)
		if err != nil {
			return err
		}
		conn, end := context.WithCancel(context.WithoutCancel(ctx))
		defer end()
		peer := rpcjson.Peer{Channel: "WS_out", Addr: d.host}
		if err := srv.Admit(conn, &peer); err != nil {
			_ = c.Close(websocket.StatusTryAgainLater, "")
			return err
		}
		log.Info("websocket connected", "server", d.host)
		s := &session{c: c, srv: srv, o: opts.Serve, reading: make(chan struct{}, 1), bufs: bufs, peer: peer}
		return s.serve(conn, ctx)
	}
	b := link.Backoff{Min: opts.MinDelay, Max: opts.MaxDelay}
	return b.Redial(ctx, func() (final bool, err error) {
		err = once()
		final = errors.Is(err, rpcjson.ErrClosed)
		if ctx.Err() == nil && !final {
			log.Warn("websocket lost", "server", d.host, "err", err)
		}
		return final, err
	})
}
