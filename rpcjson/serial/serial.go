// Package serial carries frames over serial ports, with go.bug.st/serial: for
// devices that are updated by cable ([Serve]), and for those who update them
// ([Dial]).
//
//	go serial.Serve(ctx, srv, "/dev/ttyS1", nil)
//
//	c, err := rpcjson.Dial(ctx, "serial:///dev/ttyUSB0?baud=115200", &rpcjson.ClientOptions{
//		Dialers: map[string]rpcjson.Dialer{"serial": serial.Dial},
//	})
//
// A line has 8 data bits, no parity and one stop bit, and is 115200 baud fast,
// as in Mongoose OS (mongoose-os-libs/rpc-uart, mongoose-os/mos
// common/mgrpc/codec/serial.go).
//
// Whoever can reach the connector can call: physical access is all that protects
// a serial port, except what the Authorizer of the server demands of the frames.
// Nothing is encrypted.
package serial

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/url"
	"os"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"time"

	bugst "go.bug.st/serial"

	"github.com/slotota/ota"
	"github.com/slotota/ota/rpcjson"
)

// FlowControl says how the receiver of data stops its sender.
type FlowControl uint8

// The kinds of flow control.
const (
	XONXOFF  FlowControl = iota // by control characters
	Hardware                    // by the lines RTS and CTS; on Linux only
	NoFlow
)

// Defaults of Options.
const (
	DefaultBaudRate = 115200
	DefaultPeer     = "UART0" // what RPC.Ping answers, as the original does

	minReopen = time.Second
	maxReopen = 30 * time.Second
)

// Options configure a port. The zero value is 115200 baud with XON/XOFF.
type Options struct {
	// BaudRate is bits per second; 0 means DefaultBaudRate.
	BaudRate int
	// FlowControl is XONXOFF if not set.
	FlowControl FlowControl
	// Stream says how frames are carried; nil means [rpcjson.SerialStream].
	// Whether it obeys XON and XOFF is what FlowControl says.
	Stream *rpcjson.StreamOptions
	// ControlLines keeps the lines DTR and RTS as opening leaves them: on. Dial
	// turns them off, because they reset many boards.
	ControlLines bool
	// PeerAddr is the Addr of the [rpcjson.Peer]; "" means DefaultPeer.
	PeerAddr string
	// Open opens the port; nil means Open of this package. Close of what it
	// returns must make Read and Write return.
	Open func(name string, o *Options) (io.ReadWriteCloser, error)
	// Logger is told by Serve when the port comes and goes; nil means silence.
	Logger *slog.Logger
}

// complete returns a copy of o with the defaults filled in.
func (o *Options) complete() (Options, error) {
	var c Options
	if o != nil {
		c = *o
	}
	if c.BaudRate == 0 {
		c.BaudRate = DefaultBaudRate
	}
	if c.BaudRate < 0 || c.BaudRate > 20_000_000 {
		return c, fmt.Errorf("serial: %d baud: %w", c.BaudRate, ota.ErrInvalid)
	}
	if c.FlowControl > NoFlow {
		return c, fmt.Errorf("serial: flow control %d: %w", c.FlowControl, ota.ErrInvalid)
	}
	so := rpcjson.SerialStream()
	if c.Stream != nil {
		*so = *c.Stream
	}
	so.FlowControl = c.FlowControl == XONXOFF
	c.Stream = so
	if c.PeerAddr == "" {
		c.PeerAddr = DefaultPeer
	}
	if c.Open == nil {
		c.Open = Open
	}
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	return c, nil
}

// Open opens the serial port name, such as /dev/ttyUSB0 or COM7, for its exclusive
// use. o may be nil.
func Open(name string, o *Options) (io.ReadWriteCloser, error) {
	opt, err := o.complete()
	if err != nil {
		return nil, err
	}
	flow := func() error { return nil }
	if opt.FlowControl == Hardware {
		// Before the port is exclusive.
		if flow, err = hardwareFlow(name); err != nil {
			return nil, fmt.Errorf("serial: open %s: RTS/CTS: %w", ota.Quote(name), err)
		}
	}
	p, err := bugst.Open(name, &bugst.Mode{BaudRate: opt.BaudRate})
	if err == nil {
		if err = p.SetReadTimeout(readEvery); err != nil {
			p.Close()
		}
	}
	if ferr := flow(); err == nil && ferr != nil {
		p.Close()
		err = fmt.Errorf("RTS/CTS: %w", ferr)
	}
	if err != nil {
		return nil, fmt.Errorf("serial: open %s: %w", ota.Quote(name), err)
	}
	return newPort(p), nil
}

const (
	readEvery = 250 * time.Millisecond // how often a Read looks whether the port was closed
	closeWait = time.Second            // for whoever uses the port at Close
)

// port makes Close safe: the port of the library must not be used during and after
// it, because its descriptor may already be that of another file. So who uses it
// last closes it.
type port struct {
	p    bugst.Port
	done chan struct{} // closed by Close
	gone chan struct{} // closed when p is closed

	mu     sync.Mutex
	users  int
	closed bool
}

func newPort(p bugst.Port) *port {
	return &port{p: p, done: make(chan struct{}), gone: make(chan struct{})}
}

func (p *port) enter() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		return os.ErrClosed
	}
	p.users++
	return nil
}

func (p *port) leave() {
	p.mu.Lock()
	p.users--
	last := p.closed && p.users == 0
	p.mu.Unlock()
	if last {
		p.p.Close()
		close(p.gone)
	}
}

// Read implements io.Reader.
func (p *port) Read(b []byte) (int, error) {
	if len(b) == 0 {
		return 0, nil
	}
	for {
		if err := p.enter(); err != nil {
			return 0, err
		}
		n, err := p.p.Read(b)
		p.leave()
		if n > 0 || err != nil {
			return n, err
		}
	}
}

// Write implements io.Writer. If flow control holds it up, its system call may
// outlast it: nothing ends that but the other side, or the end of the line.
func (p *port) Write(b []byte) (int, error) {
	if err := p.enter(); err != nil {
		return 0, err
	}
	type result struct {
		n   int
		err error
	}
	c := make(chan result, 1)
	own := bytes.Clone(b)
	go func() {
		defer p.leave()
		var r result
		for r.n < len(own) && r.err == nil {
			var k int
			k, r.err = p.p.Write(own[r.n:])
			r.n += k
		}
		c <- r
	}()
	select {
	case r := <-c:
		return r.n, r.err
	case <-p.done:
		return 0, os.ErrClosed
	}
}

// Close ends Read and Write, and closes the port once they have. What is not yet
// sent may be lost.
func (p *port) Close() error {
	p.mu.Lock()
	closed := p.closed
	p.closed = true
	if !closed {
		p.users++
	}
	p.mu.Unlock()
	if closed {
		return nil
	}
	close(p.done)
	_ = p.p.ResetOutputBuffer() // a Write that is held up ends when there is room
	p.leave()
	t := time.NewTimer(closeWait)
	defer t.Stop()
	select {
	case <-p.gone:
	case <-t.C:
	}
	return nil
}

// Serve serves the frames that come over the port name until ctx ends or the
// server is closed, which it returns the cause of. If the port cannot be opened or
// fails, because it has been unplugged, Serve opens it again, after 1 to 30
// seconds; meanwhile only ctx ends it. It returns an error that wraps
// [ota.ErrInvalid] at once. o may be nil.
//
// See [rpcjson.Server.ServeStream], which it calls. OTA.Write needs a checksum,
// because a flipped bit can still be valid JSON.
func Serve(ctx context.Context, s *rpcjson.Server, name string, o *Options) error {
	opt, err := o.complete()
	if err != nil {
		return err
	}
	log := opt.Logger.With("port", name)
	for delay := minReopen; ; delay = min(2*delay, maxReopen) {
		p, err := opt.Open(name, &opt)
		if errors.Is(err, ota.ErrInvalid) {
			return err
		}
		if err == nil {
			log.Info("serial port opened")
			opened := time.Now()
			err = s.ServeStream(ctx, p, rpcjson.Peer{Channel: "UART", Addr: opt.PeerAddr}, opt.Stream)
			if errors.Is(err, rpcjson.ErrClosed) {
				return err
			}
			if time.Since(opened) > maxReopen {
				delay = minReopen
			}
		}
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		log.Warn("serial port lost", "err", err, "retry", delay)
		t := time.NewTimer(delay)
		select {
		case <-t.C:
		case <-ctx.Done():
		}
		t.Stop()
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
	}
}

// NewChannel returns a channel over the port name, which it opens for the first
// call and again after it was lost. o may be nil.
func NewChannel(name string, o *Options) (rpcjson.Channel, error) {
	opt, err := o.complete()
	if err != nil {
		return nil, err
	}
	return rpcjson.NewStream(func(context.Context) (io.ReadWriteCloser, error) {
		p, err := opt.Open(name, &opt)
		if err != nil {
			return nil, err
		}
		if q, ok := p.(*port); ok && !opt.ControlLines {
			// Not every port has these lines.
			_ = q.p.SetDTR(false)
			if opt.FlowControl != Hardware {
				_ = q.p.SetRTS(false)
			}
		}
		return p, nil
	}, opt.Stream), nil
}

// Dial is an [rpcjson.Dialer] for URLs of the form
//
//	serial:///dev/ttyUSB0[?baud=N][&flow=xonxoff|hardware|none][&pace=BYTES]
//
// or serial://COM7. pace splits what is sent into pieces of so many bytes, 5 ms
// apart: mos sends 16, and devices with small buffers may need it.
func Dial(_ context.Context, u *url.URL, _ *rpcjson.ClientOptions) (rpcjson.Channel, error) {
	name := u.Path
	if runtime.GOOS == "windows" {
		name = strings.TrimPrefix(name, "/")
	}
	if u.Host != "" && (name == "" || name == "/") {
		name = u.Host
	} else if u.Host != "" {
		name = ""
	}
	if name == "" || u.User != nil {
		return nil, errors.New("need serial:///dev/PORT or serial://COMn")
	}
	o := Options{Stream: rpcjson.SerialStream()}
	q, err := url.ParseQuery(u.RawQuery)
	if err != nil {
		return nil, errors.New("bad query")
	}
	for k := range q {
		v := q.Get(k)
		switch k {
		case "baud":
			if o.BaudRate, err = strconv.Atoi(v); err != nil || o.BaudRate <= 0 {
				return nil, fmt.Errorf("baud %s: need a number", ota.Quote(v))
			}
		case "flow":
			i := 0
			for i = range flows {
				if flows[i] == v {
					o.FlowControl = FlowControl(i)
					break
				}
			}
			if flows[i] != v {
				return nil, fmt.Errorf("flow %s: need %s", ota.Quote(v), strings.Join(flows[:], ", "))
			}
		case "pace":
			n, err := strconv.Atoi(v)
			if err != nil || n <= 0 {
				return nil, fmt.Errorf("pace %s: need a number of bytes", ota.Quote(v))
			}
			o.Stream.PieceSize, o.Stream.PieceDelay = n, 5*time.Millisecond
		default:
			return nil, fmt.Errorf("%s: need baud, flow or pace", ota.Quote(k))
		}
	}
	return NewChannel(name, &o)
}

var flows = [...]string{XONXOFF: "xonxoff", Hardware: "hardware", NoFlow: "none"}
