package rpcjson

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"

	"github.com/slotota/ota"
)

// errChannelClosed is the error of a channel after its Close.
var errChannelClosed = errors.New("the channel is closed")

// callTable has the calls of a client that wait for their replies.
type callTable struct {
	mu    sync.Mutex
	calls map[string]chan answer // by id
}

// answer is a reply, or the reason why there will be none.
type answer struct {
	frame []byte
	err   error
}

// add expects a reply to the call id. done must be called at the end.
func (w *callTable) add(id string) (reply <-chan answer, done func(), err error) {
	c := make(chan answer, 1)
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.calls == nil {
		w.calls = map[string]chan answer{}
	}
	if w.calls[id] != nil {
		return nil, nil, fmt.Errorf("another call with the id %s is under way: %w", ota.Quote(id), ota.ErrInvalid)
	}
	w.calls[id] = c
	return c, func() {
		w.mu.Lock()
		defer w.mu.Unlock()
		delete(w.calls, id)
	}, nil
}

// answer hands a to the call id, if that still waits for it.
func (w *callTable) answer(id string, a answer) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if c := w.calls[id]; c != nil {
		select {
		case c <- a:
		default: // answered twice
		}
	}
}

// fail ends all calls.
func (w *callTable) fail(err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, c := range w.calls {
		select {
		case c <- answer{err: err}:
		default:
		}
	}
}

// frameID returns the id of a frame, and its method, which is empty in a reply.
// The frame may be incomplete.
func frameID(b []byte) (id, method string) {
	if i := bytes.LastIndexByte(b[:min(len(b), 256)], ','); i > 0 && len(b) > 256 {
		// Mostly they come first, before much data.
		if id, method := frameID(b[:i]); id != "" && method != "" {
			return id, method
		}
	}
	_ = members(b, DefaultMaxDepth, func(key []byte, v token) {
		switch string(key) {
		case "id":
			id = v.text()
		case "method":
			method = v.text()
		}
	})
	return id, method
}

// Stream is a [Channel] over a byte stream: a serial line, a TCP connection or
// whatever carries bytes both ways. It reconnects with the next call after the
// stream has ended or failed.
type Stream struct {
	dial func(context.Context) (io.ReadWriteCloser, error)
	o    StreamOptions

	dialing chan struct{} // holds an element while somebody connects
	wg      sync.WaitGroup

	mu     sync.Mutex
	given  io.ReadWriteCloser // of NewStreamOf, until link has it
	link   *streamLink        // nil without connection
	closed bool
}

// streamLink is one connection of a Stream.
type streamLink struct {
	*stream
	callTable
	lost   chan struct{} // closed at its end; then valid:
	err    error
	shaken chan struct{} // gets an element for each answer to a handshake

	mu   sync.Mutex
	sync bool // the device is known to listen
}

// NewStream returns a channel that calls dial whenever it needs a connection. It
// closes what it got when it is lost, and with Close, which must make Read and
// Write return. o may be nil.
func NewStream(dial func(context.Context) (io.ReadWriteCloser, error), o *StreamOptions) *Stream {
	return &Stream{dial: dial, o: o.complete(MaxStreamReply), dialing: make(chan struct{}, 1)}
}

// NewStreamOf returns a channel over rwc, which it closes in the end. There is no
// other stream once rwc has ended.
func NewStreamOf(rwc io.ReadWriteCloser, o *StreamOptions) *Stream {
	s := NewStream(nil, o)
	s.given = rwc
	s.dial = func(context.Context) (io.ReadWriteCloser, error) {
		s.mu.Lock()
		defer s.mu.Unlock()
		if s.given == nil {
			return nil, errors.New("the stream has ended")
		}
		s.given = nil
		return rwc, nil
	}
	return s
}

// DialTCP returns a client for the device at addr (host:port), by frames on a TCP
// connection: without encryption, and to be authenticated within the frames.
// Nothing is sent yet. Both options may be nil.
func DialTCP(addr string, o *ClientOptions, so *StreamOptions) *Client {
	return NewClient(dialStream("tcp", addr, so), o)
}

// DialUnix is [DialTCP] for a Unix socket.
func DialUnix(path string, o *ClientOptions, so *StreamOptions) *Client {
	return NewClient(dialStream("unix", path, so), o)
}

func dialStream(network, addr string, o *StreamOptions) *Stream {
	d := &net.Dialer{Timeout: dialTimeout}
	return NewStream(func(ctx context.Context) (io.ReadWriteCloser, error) { return d.DialContext(ctx, network, addr) }, o)
}

// Stdio returns standard input and output as one stream. Its Close closes both,
// which does not end a Read of a terminal or a file.
func Stdio() io.ReadWriteCloser { return stdio{} }

type stdio struct{}

func (stdio) Read(b []byte) (int, error)  { return os.Stdin.Read(b) }
func (stdio) Write(b []byte) (int, error) { return os.Stdout.Write(b) }
func (stdio) Close() error                { return errors.Join(os.Stdin.Close(), os.Stdout.Close()) }

// ChunkSize returns the size of chunks that suits the stream, 0 for any.
func (s *Stream) ChunkSize() int { return s.o.ChunkSize }

// Close closes the connection and ends the calls under way.
func (s *Stream) Close() error {
	s.mu.Lock()
	l, given := s.link, s.given
	s.closed, s.link, s.given = true, nil, nil
	s.mu.Unlock()
	var err error
	switch {
	case l != nil:
		err = l.rwc.Close()
	case given != nil:
		err = given.Close()
	}
	s.wg.Wait()
	return err
}

// connected returns the connection, a new one if there is none.
func (s *Stream) connected(ctx context.Context) (*streamLink, error) {
	select {
	case s.dialing <- struct{}{}:
		defer func() { <-s.dialing }()
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
	s.mu.Lock()
	l, closed := s.link, s.closed
	s.mu.Unlock()
	if closed {
		return nil, errChannelClosed
	}
	if l != nil {
		select {
		case <-l.lost:
		default:
			return l, nil
		}
	}
	rwc, err := s.dial(ctx)
	if err != nil {
		return nil, err
	}
	l = &streamLink{stream: newStream(rwc, s.o), lost: make(chan struct{}), shaken: make(chan struct{}, 1)}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		rwc.Close()
		return nil, errChannelClosed
	}
	s.link = l
	s.wg.Go(l.run)
	return l, nil
}

// run receives until the stream ends.
func (l *streamLink) run() {
	err := l.read(&decoder{max: l.o.MaxFrame, strict: true, emit: l.item}, nil)
	if err == nil {
		err = io.ErrUnexpectedEOF
	}
	l.rwc.Close()
	l.err = fmt.Errorf("connection lost: %w", err)
	close(l.lost)
}

func (l *streamLink) item(it item, b []byte) {
	switch it {
	case itemXON, itemXOFF:
		l.flow(it == itemXON)
	case itemHandshake:
		select {
		case l.shaken <- struct{}{}:
		default:
		}
	case itemText:
		if l.o.Text != nil {
			l.o.Text(b)
		}
	case itemLong:
		if id, method := frameID(b); method == "" {
			l.answer(id, answer{err: errTooLongReply(l.o.MaxFrame)})
		}
	case itemFrame, itemChecked:
		if id, method := frameID(b); method == "" {
			l.answer(id, answer{frame: b})
		}
	}
}

// shake waits until the device answers a handshake, unless it is known to listen.
func (l *streamLink) shake(ctx context.Context) error {
	l.mu.Lock()
	done := l.sync
	l.mu.Unlock()
	if done {
		return nil
	}
	select {
	case <-l.shaken: // an old one
	default:
	}
	for {
		l.flow(true)
		if err := l.write(ctx, []byte(handshake+"\n\n")); err != nil {
			return err
		}
		wait, cancel := context.WithTimeout(ctx, handshakeEvery)
		select {
		case <-l.shaken:
			cancel()
			l.mu.Lock()
			l.sync = true
			l.mu.Unlock()
			return l.write(ctx, []byte(oldDelimiter))
		case <-l.lost:
			cancel()
			return l.err
		case <-wait.Done():
			cancel()
			if ctx.Err() != nil {
				return fmt.Errorf("no answer to the handshake: %w", context.Cause(ctx))
			}
		}
	}
}

// RoundTrip implements [Channel].
func (s *Stream) RoundTrip(ctx context.Context, frame []byte, max int) ([]byte, error) {
	l, err := s.connected(ctx)
	if err != nil {
		return nil, err
	}
	id, _ := frameID(frame)
	reply, done, err := l.add(id)
	if err != nil {
		return nil, err
	}
	defer done()
	if l.o.Handshake {
		if err := l.shake(ctx); err != nil {
			return nil, err
		}
	}
	b := appendFrame(make([]byte, 0, len(frame)+32), frame, shape{quotes: true, crc: l.o.CRC || l.o.NeedCRC})
	if err := l.write(ctx, b); err != nil {
		select {
		case a := <-reply: // came although not all was written: a refusal
			return a.take(max)
		default:
			return nil, err
		}
	}
	select {
	case a := <-reply:
		return a.take(max)
	case <-l.lost:
		select {
		case a := <-reply: // before the end
			return a.take(max)
		default:
			return nil, l.err
		}
	case <-ctx.Done():
		l.mu.Lock()
		l.sync = false
		l.mu.Unlock()
		return nil, context.Cause(ctx)
	}
}

// take returns the reply if it is not too long.
func (a answer) take(max int) ([]byte, error) {
	if a.err == nil && len(a.frame) > max {
		a.err = errTooLongReply(max)
	}
	return a.frame, a.err
}
