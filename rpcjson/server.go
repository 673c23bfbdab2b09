// Package rpcjson serves the remote procedure calls of a device: the OTA
// methods of Mongoose OS and what a client needs beside them, as mg-rpc frames
// over any transport and as HTTP. The genuine client, mos, understands it.
//
//	access, err := rpcjson.NewAccess(rpcjson.AccessOptions{Passwords: passwords})
//	…
//	srv, err := rpcjson.New(dev, rpcjson.Options{
//		ID:         "esp32_123456",
//		Info:       rpcjson.Info{App: "demo", Version: "1.0", BuildID: "…", Platform: "esp32"},
//		Open:       openBundle, // reads and verifies a firmware file
//		Authorizer: access,     // decides who may call what
//	})
//	…
//	mux.Handle("/rpc", srv)
//	mux.Handle("/rpc/", srv)
//	…
//	err = rpcjson.NewHTTPServer(mux).Serve(listener)
//
// There is no default under which everybody may call: without an [Authorizer], New
// fails unless NoAuth says so. [Access] is one for all transports: digest
// authentication as of Mongoose OS, bearer tokens, client certificates, with rights
// for each user or an access list.
//
// The parts, from the bottom up: a codec for frames, [Server.Serve], which takes
// a frame from any transport and hands back the reply, and the transports: the
// http.Handler, [Server.ServeStream] for byte streams, [Server.ServeListener] for
// TCP and Unix sockets, [Server.ServePacket] for UDP, [Server.NewGATTServer] for
// Bluetooth Low Energy; package rpcjson/serial has serial ports. Of these only
// HTTP can be encrypted. What reaches a device over the others has to prove in
// its frames who sends it (see [Authorizer]), or has the rights of whoever holds
// the cable, may open the socket, or is near enough.
//
// Built in are RPC.List, RPC.Describe and RPC.Ping, Sys.GetInfo, Sys.GetUID and
// Sys.Reboot, OTA.Update (the device pulls), OTA.Begin, OTA.Write and OTA.End (the
// client pushes), OTA.Status, OTA.Commit, OTA.Revert, OTA.CreateSnapshot,
// OTA.GetBootState and OTA.SetBootState. OTA.Commit also takes the argument trial,
// for devices that demand it (see [ota.Options]). [Server.Handle] adds methods.
//
// OTA.Begin also takes the argument window: how many calls of OTA.Write a client
// wants to have under way, each with the data after that of the one before. The
// result then has the member window, which is how many it may have, at most three.
// Calls that overtake each other wait for up to five seconds for what is missing.
// That hides the time a chunk takes on its way.
//
// An update goes on when its caller leaves, and OTA.Status tells how it ended.
// OTA.End aborts one that is incomplete, also one by OTA.Update. The reboot comes
// 500 ms after the reply to an update, 300 ms after that to OTA.Revert, and anyway
// if nobody takes the reply. In the last 100 ms before it calls are refused with
// code 418, and for a minute after it if it had no effect.
//
// A push session belongs to the client that has begun it: to the user if there
// are credentials, over whatever connection; else to the connection (TCP, Unix
// socket, WebSocket, serial line), the source address (UDP), the src of the frames
// (MQTT), or to all of HTTP, where each call may have a connection of its own.
// Others are answered code 503 to OTA.Write and OTA.End, in order that they neither
// disturb nor abort it. Without credentials the session passes to another
// connection or port of the same host (over MQTT, of the same broker) as soon as
// the old connection has ended, or after ten seconds of silence if that has not been
// noticed; and after 30 s of silence to anybody with the right to install, so that
// what is left behind never blocks a device. Clients that lost their connection
// thus go on, at the offset that the device tells them.
//
// Formats, codes and texts follow mongoose-os-libs/rpc-common (src/mg_rpc.c,
// src/mgos_rpc.c) and mongoose-os-libs/rpc-service-ota. Differences, all on
// purpose: no wildcard CORS header; requests that a web page could have caused
// are refused; arguments of a wrong type are refused instead of ignored, and
// methods that change something do not run on a broken frame; nearly every error
// has a message.
package rpcjson

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/slotota/ota"
	"github.com/slotota/ota/fetch"
	"github.com/slotota/ota/internal/link"
)

// ErrClosed says that the server has been closed.
var ErrClosed = errors.New("rpcjson: server closed")

// Authorizer errors. One that wraps neither, and is no *[Error], is answered with
// code 500 and also denies.
var (
	ErrUnauthenticated = errors.New("rpcjson: no valid credentials") // code 401
	ErrForbidden       = errors.New("rpcjson: not allowed")          // code 403
)

// Right is what a caller must be allowed to do to call a method.
type Right uint8

// The rights. None includes another.
const (
	Read    Right = iota + 1 // look: OTA.GetBootState, OTA.Status, RPC.*, Sys.GetInfo, Sys.GetUID
	Operate                  // decide about what is installed: OTA.Commit, OTA.Revert, Sys.Reboot
	Install                  // change what is installed: OTA.Update, OTA.Begin, OTA.SetBootState, …
)

// String returns a word for r.
func (r Right) String() string {
	switch r {
	case Read:
		return "read"
	case Operate:
		return "operate"
	case Install:
		return "install"
	}
	return fmt.Sprintf("unknown (%d)", uint8(r))
}

// Peer describes who sent a frame, and over what.
type Peer struct {
	// Channel is the type of the transport as in access lists: HTTP, WS_in,
	// WS_out, UART, MQTT, UDP_in, UDP_out, GATTS, loopback; beyond the
	// original also TCP and UNIX, for frames on such streams.
	Channel string
	// Addr is the address of the peer for people, as RPC.Ping answers it; ""
	// if not known.
	Addr string
	// Request is the HTTP request that carried the frame or opened the
	// channel; nil on other transports.
	Request *http.Request
	// TLS is the state of the channel's TLS, nil if it has none or Request
	// tells.
	TLS *tls.ConnectionState
	// User is who the channel as a whole has shown to belong to, "" if nobody;
	// it is believed. [Server.Admit] fills it in. When a handler runs it is the
	// user that was authorized.
	User string
	// Auth is the text of the frame's auth member, nil if there is none. It
	// is filled in for each frame.
	Auth []byte

	admitted bool            // by Admit
	ended    <-chan struct{} // closed at the end of the channel; nil if there is none
}

// Authorizer decides who may call what. It is called for each request that has
// a handler, before its arguments are looked at, from any number of goroutines.
//
// A nil error allows the call. An error that wraps [ErrUnauthenticated] says that
// credentials are missing or wrong, [ErrForbidden] that they do not suffice; an
// *[Error] is sent as it is, with code 403 if it has none. If the error has a
// method WWWAuthenticate() string, its result becomes that header of an HTTP
// answer 401.
type Authorizer interface {
	Authorize(ctx context.Context, peer *Peer, method string, right Right) error
}

// Identifier is what an [Authorizer] can be beside, for channels that carry many
// frames: it says who has opened one, by the header of peer.Request or by the
// certificate in its TLS, "" if there are no credentials. The error wraps
// [ErrUnauthenticated] if they are wrong.
type Identifier interface {
	Identify(ctx context.Context, peer *Peer) (user string, err error)
}

// AuthorizerFunc is an [Authorizer] made of a function.
type AuthorizerFunc func(ctx context.Context, peer *Peer, method string, right Right) error

// Authorize calls f.
func (f AuthorizerFunc) Authorize(ctx context.Context, peer *Peer, method string, right Right) error {
	return f(ctx, peer, method, right)
}

// Info describes the running firmware and its device, for Sys.GetInfo and for
// the headers of a download. In the latter whatever is not printable ASCII is
// replaced by a question mark, and what is longer than 128 bytes is cut.
type Info struct {
	App       string // name, as in the manifest
	Version   string
	BuildID   string
	Platform  string
	MAC       string // hardware address without separators
	OSVersion string // answered as mg_version
	OSBuildID string // answered as mg_id
	PublicKey string
	UID       string // unique number of the hardware, for Sys.GetUID
	ProductID string // pid of Sys.GetUID
	// Usage tells the current values. nil makes Sys.GetInfo answer the time
	// since New, and zeros.
	Usage func() Usage
}

// Usage is the part of Sys.GetInfo that changes; sizes in bytes.
type Usage struct {
	Uptime                       time.Duration
	RAMSize, RAMFree, RAMMinFree int64
	FSSize, FSFree               int64
}

// Defaults and limits of Options.
const (
	DefaultMaxFrame      = 128 << 10
	DefaultMaxDepth      = 16
	DefaultMaxPending    = 32
	DefaultUpdateTimeout = 600 * time.Second
	DefaultTotalTimeout  = 24 * time.Hour
	maxTimeout           = 30 * 24 * time.Hour
)

// Options configure a [Server].
type Options struct {
	// ID is the device id: the src of every reply. Required.
	ID string
	// Info describes the running firmware.
	Info Info
	// Open reads and verifies the beginning of a firmware file and returns
	// the image, for OTA.Update and OTA.Begin. It must give up when r fails.
	// nil refuses both.
	Open func(ctx context.Context, r io.Reader) (ota.Image, error)
	// OpenRanges, if not nil, takes the place of Open for what OTA.Update
	// downloads from a server that takes range requests. The image may then
	// leave out what the device has already. If the error wraps
	// [ota.ErrUnsupported], Open gets the file all the same. An image that is an
	// io.Closer is closed.
	OpenRanges func(ctx context.Context, f *fetch.File) (ota.Image, error)

	// Authorizer decides about every call; required unless NoAuth.
	Authorizer Authorizer
	// NoAuth lets everybody who reaches the server install firmware. (It must
	// still pass the signature check of Open.)
	NoAuth bool
	// Limits bound what peers can do without being authorized; nil means the
	// defaults.
	Limits *Limits

	// AllowHosts are the names by which HTTP clients may call the device,
	// without port. Addresses and localhost always work. Other names are
	// refused, because any web page can make its own name point here.
	AllowHosts []string
	// AllowOrigins are foreign origins whose pages may call, such as
	// "https://api.cesanta.com", which the mos client sends on WebSocket.
	AllowOrigins []string
	// AllowGET are methods that may be called by GET although they need more
	// than the right Read, such as "Sys.Reboot". Any web page can call these,
	// through the browser of whoever opens it: for the browser they are
	// pictures to be loaded, sent with what credentials it has. A Referer
	// that names the page is refused, but pages can leave it out. Methods
	// that need Read may always be called by GET.
	AllowGET []string

	MaxFrame   int // bytes of a frame or HTTP body; 0 means DefaultMaxFrame
	MaxDepth   int // levels of nested JSON; 0 means DefaultMaxDepth
	MaxPending int // calls being served, and HTTP bodies being read, at a time; 0 means DefaultMaxPending

	// Fetch says what OTA.Update may download, and from where. nil means over
	// HTTPS from hosts with public addresses: a server inside of the local
	// network needs AllowPrivate, one without TLS AllowHTTP. It must not be
	// changed after New.
	Fetch *fetch.Policy
	// HTTPClient downloads for OTA.Update; nil means the client of Fetch. Of
	// Fetch, its URLs and redirects obey what [fetch.Policy.CheckURL] and
	// [fetch.Policy.CheckRedirect] check; the addresses that names stand for,
	// time limits and all else are its own.
	HTTPClient *http.Client
	// AllowURL, if not nil, must accept each URL before it is requested.
	AllowURL func(*url.URL) error
	// UpdateURL is what OTA.Update downloads, unless already running, if it
	// is given neither url nor file.
	UpdateURL string
	// OpenFile opens a local firmware file for OTA.Update; nil refuses.
	OpenFile func(name string) (io.ReadCloser, error)

	// UpdateTimeout is how long an update waits for data before it gives up,
	// if the caller does not say; 0 means DefaultUpdateTimeout. As long it goes
	// on without success after a connection broke; a URL that cannot be opened
	// is tried three times only. See RetryFor of [fetch.Options].
	UpdateTimeout time.Duration
	// TotalTimeout bounds an update as a whole; 0 means DefaultTotalTimeout,
	// and a negative value no bound. No other update can start meanwhile,
	// unless OTA.End ends this one.
	TotalTimeout time.Duration
	// CommitTimeout is that of updates whose caller does not say, see
	// [ota.UpdateOptions].
	CommitTimeout time.Duration

	// Logger gets a line for each call that changes something; nil means
	// silence.
	Logger *slog.Logger
}

// device is what a Server needs of an *ota.Device.
type device interface {
	Update(context.Context, ota.Image, *ota.UpdateOptions) (ota.UpdateResult, error)
	Commit(context.Context) error
	CommitTrial(context.Context, ota.TrialID) error
	Revert(context.Context) error
	CreateSnapshot(context.Context, *ota.SnapshotOptions) (ota.SlotID, error)
	BootState(context.Context) (ota.BootState, error)
	SetBootState(context.Context, ota.BootStatePatch) error
	Status() ota.Status
	Reboot(context.Context) error
}

// Request is a call on its way to a handler.
type Request struct {
	// Method is the name as registered.
	Method string
	// Src is how the caller names itself; "" if it does not.
	Src  string
	Peer *Peer
	Args *Args

	after func() // to be done once the reply is sent
}

// HandlerFunc serves a method. The result is encoded by encoding/json, except
// that a [json.RawMessage] is sent as it is and must be valid JSON; nil and an
// empty one are sent as null. An *[Error] is sent as it is, another error with
// code 500 and its text.
// Several calls may run at once. ctx ends when the caller goes away, if the
// transport can tell, or the server is closed.
type HandlerFunc func(ctx context.Context, r *Request) (result any, err error)

type method struct {
	name, args string
	right      Right
	handle     HandlerFunc
}

// Server serves calls for one device. All methods may be called at any time from
// any goroutine.
type Server struct {
	d       device
	o       Options
	log     *slog.Logger
	fetch   fetch.Policy
	client  *http.Client
	start   time.Time
	limits  *limiter
	pending chan struct{} // one element for each call being served
	reading chan struct{} // one for each HTTP body being read
	bodies  link.Buffers  // of HTTP
	chunks  link.Buffers  // of push sessions

	ctx    context.Context // of what outlives a call; ends with Close
	cancel context.CancelFunc
	wg     sync.WaitGroup // goroutines and calls

	mu      sync.Mutex // guards what follows, and is never held across calls
	closed  bool
	methods []*method // newest first
	update  *update   // under way, or the last one
	timer   *time.Timer
	due     time.Time // of the reboot; zero if there is none
}

// New returns a server for d. The error wraps [ota.ErrInvalid] and names the
// option.
func New(d *ota.Device, o Options) (*Server, error) {
	if d == nil {
		return nil, fmt.Errorf("rpcjson: no device: %w", ota.ErrInvalid)
	}
	return newServer(d, o)
}

func newServer(d device, o Options) (*Server, error) {
	if err := o.complete(); err != nil {
		return nil, fmt.Errorf("rpcjson: %w: %w", err, ota.ErrInvalid)
	}
	s := &Server{
		d:       d,
		o:       o,
		log:     o.Logger,
		start:   time.Now(),
		limits:  newLimiter(o.Limits),
		pending: make(chan struct{}, o.MaxPending),
		reading: make(chan struct{}, o.MaxPending),
	}
	if o.Fetch != nil {
		s.fetch = *o.Fetch
	}
	s.client = s.newClient()
	s.ctx, s.cancel = context.WithCancel(context.Background())
	s.addMethods()
	return s, nil
}

// complete checks the options and fills in the defaults.
func (o *Options) complete() error {
	if o.ID == "" || len(o.ID) > 128 {
		return errors.New("ID: need 1 to 128 bytes")
	}
	if o.Authorizer == nil && !o.NoAuth {
		return errors.New("Authorizer: need one, or NoAuth")
	}
	if o.Authorizer != nil && o.NoAuth {
		return errors.New("NoAuth: contradicts Authorizer")
	}
	if printableText(o.ID) != o.ID {
		return fmt.Errorf("ID: %s: need printable ASCII", ota.Quote(o.ID))
	}
	for _, v := range []struct {
		name     string
		p        *int
		def, max int
	}{
		{"MaxFrame", &o.MaxFrame, DefaultMaxFrame, 64 << 20},
		{"MaxDepth", &o.MaxDepth, DefaultMaxDepth, 1000},
		{"MaxPending", &o.MaxPending, DefaultMaxPending, 10000},
	} {
		if *v.p == 0 {
			*v.p = v.def
		}
		if *v.p < 1 || *v.p > v.max {
			return fmt.Errorf("%s: need 1 to %d", v.name, v.max)
		}
	}
	if o.UpdateTimeout == 0 {
		o.UpdateTimeout = DefaultUpdateTimeout
	}
	if o.UpdateTimeout < 0 || o.UpdateTimeout > maxTimeout {
		return fmt.Errorf("UpdateTimeout: need 0 to %v", maxTimeout)
	}
	if o.TotalTimeout == 0 {
		o.TotalTimeout = DefaultTotalTimeout
	}
	if o.TotalTimeout > maxTimeout {
		return fmt.Errorf("TotalTimeout: need at most %v", maxTimeout)
	}
	if o.CommitTimeout < 0 || o.CommitTimeout > ota.MaxCommitTimeout {
		return fmt.Errorf("CommitTimeout: need 0 to %v", ota.MaxCommitTimeout)
	}
	for _, v := range o.AllowOrigins {
		if u, err := url.Parse(v); err != nil || u.Scheme == "" || u.Host == "" {
			return fmt.Errorf("AllowOrigins: %s: need scheme://host", ota.Quote(v))
		}
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	return nil
}

// Handle registers a method, or replaces it if there is one of that name without
// regard to case. args describes its arguments for RPC.Describe, such as
// "{pin: %d, value: %B}". The error wraps [ota.ErrInvalid].
func (s *Server) Handle(name, args string, right Right, h HandlerFunc) error {
	switch {
	case name == "" || strings.ContainsFunc(name, func(r rune) bool { return r <= ' ' || r > '~' || r == '/' }):
		return fmt.Errorf("rpcjson: method %s: need printable ASCII without blanks and slashes: %w", ota.Quote(name), ota.ErrInvalid)
	case right < Read || right > Install:
		return fmt.Errorf("rpcjson: method %s: right %v: %w", ota.Quote(name), right, ota.ErrInvalid)
	case h == nil:
		return fmt.Errorf("rpcjson: method %s: no handler: %w", ota.Quote(name), ota.ErrInvalid)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.methods = slices.DeleteFunc(s.methods, func(m *method) bool { return strings.EqualFold(m.name, name) })
	s.methods = slices.Insert(s.methods, 0, &method{name, args, right, h})
	return nil
}

// method returns the method of that name, or nil.
func (s *Server) method(name string) *method {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, m := range s.methods {
		if strings.EqualFold(m.name, name) {
			return m
		}
	}
	return nil
}

// Call serves one frame and returns the reply; nil if there is none to be sent.
// It is [Server.Serve] for transports that cannot tell when a reply is sent: what
// the call does after its reply, such as a reboot, is counted from the return.
func (s *Server) Call(ctx context.Context, peer Peer, frame []byte) (reply []byte, err error) {
	err = s.Serve(ctx, peer, frame, func(b []byte) error {
		reply = b
		return nil
	})
	return reply, err
}

// Serve serves one frame from peer and gives the reply to send, unless the
// request wants none. A call may take long: OTA.Update is answered when it is
// over. It goes on if ctx ends before that, and nothing is sent.
//
// The error wraps [ErrInvalidFrame] if the frame is not understood (also
// [ota.ErrTooLarge] if it is too large), it is [ErrClosed] after Close, the cause
// of ctx if that ended first, or the error of send. Errors of the call itself are
// part of the reply. send owns the reply; it is called at most once, without any
// lock held.
func (s *Server) Serve(ctx context.Context, peer Peer, frame []byte, send func(reply []byte) error) error {
	f, err := s.parse(frame)
	if err != nil {
		return err
	}
	if f.method == "" {
		return nil // an answer to something that was never asked
	}
	return s.serve(ctx, &peer, &f, send, s.acquire())
}

// serve serves a request, or refuses it if it is not admitted.
func (s *Server) serve(ctx context.Context, peer *Peer, f *frame, send func(reply []byte) error, admitted bool) error {
	var result []byte
	var after func()
	var err error
	callErr := errOverflow
	if admitted {
		result, after, callErr, err = s.call(ctx, peer, f)
		if err != nil {
			return err
		}
	}
	if f.id != "" {
		err = send(appendReply(nil, f, s.o.ID, result, callErr))
	}
	if after != nil {
		after()
	}
	return err
}

// errOverflow is answered while MaxPending calls are being served.
var errOverflow = errorf(429, "Request queue overflow")

func (s *Server) acquire() bool {
	select {
	case s.pending <- struct{}{}:
		return true
	default:
		return false
	}
}

// acquireSoon is acquire for transports that bound their calls themselves: it waits for
// a while.
func (s *Server) acquireSoon(ctx context.Context) bool {
	if s.acquire() {
		return true
	}
	t := time.NewTimer(time.Second)
	defer t.Stop()
	select {
	case s.pending <- struct{}{}:
		return true
	case <-t.C:
	case <-ctx.Done():
	}
	return false
}

func (s *Server) release() { <-s.pending }

// parse decodes a frame and checks that it is meant for this device.
func (s *Server) parse(b []byte) (frame, error) {
	if len(b) > s.o.MaxFrame {
		return frame{}, fmt.Errorf("%w: %d bytes, at most %d: %w", ErrInvalidFrame, len(b), s.o.MaxFrame, ota.ErrTooLarge)
	}
	f, err := parseFrame(b, s.o.MaxDepth)
	if err != nil {
		return f, err
	}
	if f.dst != "" && f.dst != s.o.ID {
		return f, fmt.Errorf("%w: for %s", ErrInvalidFrame, ota.Quote(f.dst))
	}
	return f, nil
}

// call runs the method of f and gives back the place that the caller acquired.
// It returns the result or the error to be answered, and what to do after that,
// or an error if there is nothing to be answered.
func (s *Server) call(ctx context.Context, peer *Peer, f *frame) (result []byte, after func(), callErr *Error, err error) {
	return s.callMethod(ctx, peer, f, s.method(f.method))
}

// callMethod is call for a method that need not be registered; nil is no method.
func (s *Server) callMethod(ctx context.Context, peer *Peer, f *frame, m *method) (result []byte, after func(), callErr *Error, err error) {
	defer s.release()
	s.mu.Lock()
	closed, due := s.closed, s.due
	if !closed {
		s.wg.Add(1)
		defer s.wg.Done()
	}
	s.mu.Unlock()
	if closed {
		return nil, nil, nil, ErrClosed
	}
	if m == nil {
		if !s.o.NoAuth {
			if e := s.limits.take(peer.key(), false); e != nil {
				return nil, nil, e, nil
			}
		}
		return nil, nil, errorf(404, "No handler for %s", printable(f.method)), nil
	}
	if left := time.Until(due); !due.IsZero() && left < lockout {
		return nil, nil, errorf(418, "shutting down in %d ms", max(0, left.Milliseconds())), nil
	}
	peer.Auth = f.auth
	if e := s.authorize(ctx, peer, m); e != nil {
		return nil, nil, e, nil
	}
	switch {
	case f.paramsErr != nil:
		return nil, nil, errorf(400, "bad request: params: %v", f.paramsErr), nil
	case f.broken != nil && m.right != Read: // what is lost may be the parameters
		return nil, nil, errorf(400, "bad request: %v", f.broken), nil
	}

	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	defer context.AfterFunc(s.ctx, func() { cancel(ErrClosed) })()
	r := &Request{Method: m.name, Src: f.src, Peer: peer, Args: &Args{tok: f.params, depth: s.o.MaxDepth, all: f.args, scanned: f.args != nil}}
	v, err := m.handle(ctx, r)
	if err == nil {
		result, err = encode(v)
	}
	switch {
	case err != nil && s.ctx.Err() != nil:
		return nil, nil, nil, ErrClosed
	case err != nil && ctx.Err() != nil:
		return nil, nil, nil, context.Cause(ctx) // mostly, nobody is left to be answered
	}
	if m.right != Read {
		s.log.Info("rpc", "method", m.name, "channel", peer.Channel, "peer", peer.Addr, "user", ota.Quote(peer.User), "src", ota.Quote(f.src), "err", err)
	}
	if err != nil {
		callErr = toError(err)
	}
	return result, r.after, callErr, nil
}

// authorize returns nil if peer may call m, else what to answer.
func (s *Server) authorize(ctx context.Context, peer *Peer, m *method) *Error {
	return s.check(peer, m.name, func() error {
		return s.o.Authorizer.Authorize(ctx, peer, m.name, m.right)
	})
}

// check calls ask, which says whether credentials of peer are good for what, within
// the limits for those that are not.
func (s *Server) check(peer *Peer, what string, ask func() error) *Error {
	if s.o.NoAuth {
		return nil
	}
	login := peer.Auth != nil || !peer.admitted && peer.Request != nil && peer.Request.Header["Authorization"] != nil
	key := peer.key()
	if e := s.limits.take(key, login); e != nil {
		return e
	}
	err := ask()
	var d *denial
	switch {
	case err == nil:
		n := 1
		if login {
			n = 2 // also for the request that got the challenge
		}
		s.limits.give(key, n, login, login)
		return nil
	case errors.As(err, &d) && (d.stale || d.err == ErrForbidden && peer.User != ""):
		s.limits.give(key, 0, login, false)
	}
	s.log.Warn("rpc denied", "method", what, "channel", peer.Channel, "peer", peer.Addr, "err", err)
	return deny(err)
}

// Admit is for transports whose channels carry many frames, such as WebSocket and
// TCP, once for each channel before its first frame, with the Peer that is then
// given to Serve. It refuses an HTTP request that a foreign web page has caused, and
// peers that were refused too often. If the [Authorizer] is an [Identifier] it
// finds out who the peer is, which then holds for all frames of the channel.
//
// A push session that is begun over the channel belongs to it, as the package
// documentation says, and ctx should end when the channel does: that lets others
// continue the session.
//
// The error is an *[Error] of code 401, 403, 429 or 500 for [Server.Refuse], or
// [ErrClosed].
func (s *Server) Admit(ctx context.Context, peer *Peer) error {
	if s.ctx.Err() != nil {
		return ErrClosed
	}
	if peer.Request != nil {
		if e := s.checkBrowser(peer.Request); e != nil {
			s.log.Warn("rpc denied", "channel", peer.Channel, "peer", peer.Addr, "err", e)
			return e
		}
	}
	if !s.o.NoAuth {
		if e := s.limits.blocked(peer.key()); e != nil {
			return e
		}
		if id, ok := s.o.Authorizer.(Identifier); ok {
			if e := s.check(peer, "", func() (err error) {
				peer.User, err = id.Identify(ctx, peer)
				return err
			}); e != nil {
				return e
			}
		}
	}
	peer.admitted = true
	if peer.ended = ctx.Done(); peer.ended == nil {
		peer.ended = make(chan struct{}) // nobody will tell
	}
	return nil
}

// encode returns the JSON text of a result in ASCII.
func encode(v any) ([]byte, error) {
	switch v := v.(type) {
	case nil:
		return []byte("null"), nil
	case json.RawMessage:
		if len(v) == 0 {
			return []byte("null"), nil
		}
		return appendASCII(nil, v), nil
	}
	b, err := json.Marshal(v)
	if err != nil {
		return nil, fmt.Errorf("result: %w", err)
	}
	return appendASCII(nil, b), nil
}

// toError returns what is answered for the error of a handler.
func toError(err error) *Error {
	var e *Error
	var a *ArgError
	switch {
	case errors.As(err, &e):
		return e
	case errors.As(err, &a):
		return errorf(400, "%v", a)
	}
	return failed(500, "", err).(*Error)
}

// maxMessage bounds the message of an error, in bytes.
const maxMessage = 256

// message returns the text of err, cut and cleaned to be fit for a reply.
func message(err error) string {
	m := err.Error()
	if len(m) > maxMessage {
		m = m[:maxMessage-3] + "..."
	}
	return printableText(m)
}

// printableText returns s with whatever is not printable ASCII replaced.
func printableText(s string) string {
	return strings.Map(func(r rune) rune {
		if r < ' ' || r > '~' {
			return '?'
		}
		return r
	}, s)
}

// spawn runs f in a goroutine that Close waits for. It returns false, and does
// not run f, if the server is closed.
func (s *Server) spawn(f func()) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return false
	}
	s.wg.Go(f)
	return true
}

// run runs f to its end even if ctx ends before that; it returns early then. f
// must not touch what the caller uses after an error.
func (s *Server) run(ctx context.Context, f func(ctx context.Context) error) error {
	done := make(chan error, 1)
	if !s.spawn(func() { done <- f(s.ctx) }) {
		return ErrClosed
	}
	select {
	case err := <-done:
		return err
	case <-ctx.Done():
		return ctx.Err()
	}
}

// The delays between a reply and the reboot, and what limits the wait for a
// caller that never takes its reply.
const (
	lockout      = 100 * time.Millisecond
	updateDelay  = 500 * time.Millisecond
	revertDelay  = 300 * time.Millisecond
	rebootDelay  = 100 * time.Millisecond
	rebootAnyway = 5 * time.Second
	endAnyway    = time.Minute // for OTA.End of a push session
	maxDelay     = 10 * time.Minute
	stillUp      = time.Minute // after this the reboot has failed
)

// rebootIn reboots after d, or earlier if a reboot is due earlier.
func (s *Server) rebootIn(d time.Duration) {
	s.mu.Lock()
	defer s.mu.Unlock()
	due := time.Now().Add(d)
	if !s.due.IsZero() && !due.Before(s.due) {
		return
	}
	s.due = due
	s.later(d, s.reboot)
}

// later runs f after d, instead of what was to be run, unless the server is closed
// by then. s.mu is held.
func (s *Server) later(d time.Duration, f func()) {
	if s.closed {
		return
	}
	if s.timer != nil {
		s.timer.Stop()
	}
	var t *time.Timer
	t = time.AfterFunc(d, func() {
		s.mu.Lock()
		mine := s.timer == t && !s.closed
		if mine {
			s.wg.Add(1)
		}
		s.mu.Unlock()
		if mine {
			defer s.wg.Done()
			f()
		}
	})
	s.timer = t
}

// rebootSooner puts forward a reboot that is due, if it still is.
func (s *Server) rebootSooner(d time.Duration) {
	s.mu.Lock()
	due := s.due
	s.mu.Unlock()
	if !due.IsZero() {
		s.rebootIn(d)
	}
}

func (s *Server) reboot() {
	s.log.Info("rebooting")
	err := s.d.Reboot(s.ctx)
	if err != nil {
		s.log.Error("reboot failed", "err", err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if err != nil {
		s.due = time.Time{}
		return
	}
	// On its way down: calls are refused, but not for ever.
	s.later(stillUp, func() {
		s.log.Error("rebooting had no effect")
		s.mu.Lock()
		s.due = time.Time{}
		s.mu.Unlock()
	})
}

// Close stops serving: it calls off a reboot that is due, ends updates under
// way, which leave the device as it was, and ends the contexts of the calls being
// served. It waits until all of them have ended; calls that fail because of it,
// and later ones, return ErrClosed. It returns nil, also when called again.
//
// What it waits for must not call it, or it never returns: a handler, Authorizer,
// Open, or the device's Reset, which can leave that to a goroutine instead. Nor
// does it return before handlers that ignore their contexts.
func (s *Server) Close() error {
	s.mu.Lock()
	s.closed = true
	if s.timer != nil {
		s.timer.Stop()
	}
	s.mu.Unlock()
	s.cancel()
	s.wg.Wait()
	if s.o.HTTPClient == nil {
		s.client.CloseIdleConnections()
	}
	return nil
}
