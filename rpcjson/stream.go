package rpcjson

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/slotota/ota"
)

// Framing of byte streams: serial lines, TCP, Unix sockets, standard input and
// output. The shape of a frame, and what each side takes, follow
// mongoose-os-libs/rpc-uart (src/mgos_rpc_channel_uart.c) and mongoose-os/mos
// (common/mgrpc/codec/stream.go, serial.go):
//
//	delimiter [text] { JSON } [CRC-32 in hex [,more]] delimiter
//
// A delimiter is a line feed or, older, three quotes, which JSON cannot contain.

// Defaults of StreamOptions.
const (
	DefaultFrameTimeout = 30 * time.Second
	DefaultWriteTimeout = 10 * time.Second
	DefaultXOFFTimeout  = 5 * time.Second
	DefaultMaxCalls     = 8
)

// MaxStreamReply bounds the replies that a client takes from a stream, if its
// options do not say, in bytes.
const MaxStreamReply = DefaultMaxReply

// StreamOptions say how frames are carried by a byte stream. The zero value fits
// connections that lose and change nothing, such as TCP; for serial lines see
// [SerialStream].
type StreamOptions struct {
	// MaxFrame bounds a received frame, in bytes of JSON. Longer ones are
	// refused, without being kept. 0 means [Options.MaxFrame] for a server and
	// MaxStreamReply for a client.
	MaxFrame int
	// CRC adds a checksum to each frame that is sent. A server adds it without
	// this, too, once it has received a frame with a good one. A frame received
	// with a wrong one is dropped in any case.
	CRC bool
	// NeedCRC makes a server refuse OTA.Write in frames without checksum, and a
	// client add one to each frame.
	NeedCRC bool
	// FlowControl obeys the control characters XON and XOFF of the other side,
	// and sends them when frames come faster than they can be served. Received
	// ones are never taken for data, with and without this.
	FlowControl bool
	// Handshake makes a client wait until the device answers, before the first
	// frame of a connection and after each call that got no reply.
	Handshake bool
	// PieceSize splits what is sent into pieces of so many bytes, with a pause
	// of PieceDelay after each: for devices that cannot take more at once. mos
	// sends 16 bytes every 5 ms. 0 means no splitting.
	PieceSize  int
	PieceDelay time.Duration
	// ChunkSize is what [Client.Push] puts into an OTA.Write, in bytes, if its
	// caller does not say; 0 leaves the choice to Push.
	ChunkSize int

	// FrameTimeout is how long a frame may pause. What came of it is dropped
	// then. 0 means DefaultFrameTimeout.
	FrameTimeout time.Duration
	// WriteTimeout is how long the other side may take to accept a piece of a
	// frame. The stream is closed then. 0 means DefaultWriteTimeout.
	WriteTimeout time.Duration
	// XOFFTimeout is how long an XOFF holds: the XON may have been lost, or the
	// XOFF been noise. 0 means DefaultXOFFTimeout.
	XOFFTimeout time.Duration
	// IdleTimeout makes a server close a connection on which it has nothing to
	// do and no frame comes to its end; 0 means never. It needs a stream with the
	// method SetReadDeadline.
	IdleTimeout time.Duration
	// MaxCalls bounds the calls of one stream that a server serves at a time;
	// 0 means DefaultMaxCalls. No more is read meanwhile.
	MaxCalls int

	// Text, if not nil, gets what stands between frames, such as log output:
	// at most a line at a time, without its end. It must not keep its argument.
	Text func([]byte)
}

// SerialStream returns the options for serial lines: checksums, flow control and
// handshake as mos does it, but without its pauses (see StreamOptions.PieceSize),
// and chunks that fit into the 4096 bytes which the original takes for a frame.
func SerialStream() *StreamOptions {
	return &StreamOptions{
		NeedCRC:      true,
		FlowControl:  true,
		Handshake:    true,
		ChunkSize:    2048,
		FrameTimeout: time.Second,
	}
}

// complete returns a copy of o with the defaults filled in.
func (o *StreamOptions) complete(maxFrame int) StreamOptions {
	var c StreamOptions
	if o != nil {
		c = *o
	}
	if c.MaxFrame <= 0 {
		c.MaxFrame = maxFrame
	}
	if c.MaxCalls <= 0 {
		c.MaxCalls = DefaultMaxCalls
	}
	for _, v := range []struct {
		p   *time.Duration
		def time.Duration
	}{{&c.FrameTimeout, DefaultFrameTimeout}, {&c.WriteTimeout, DefaultWriteTimeout}, {&c.XOFFTimeout, DefaultXOFFTimeout}} {
		if *v.p <= 0 {
			*v.p = v.def
		}
	}
	return c
}

const (
	eot  = 0x04 // alone in a frame: are you there?
	xon  = 0x11
	xoff = 0x13

	oldDelimiter = `"""`
	handshake    = oldDelimiter + "\x04" + oldDelimiter

	handshakeEvery = 200 * time.Millisecond
	maxText        = 1024  // bytes of text handed out at a time
	maxMeta        = 256   // bytes between a frame and its delimiter
	readSize       = 16384 // bytes read at a time
)

// item is what a decoder finds in a stream.
type item uint8

const (
	itemFrame     item = iota // JSON text in ASCII, perhaps not well-formed
	itemChecked               // the same, with a good checksum
	itemHandshake             // nothing but 0x04
	itemBlank                 // nothing at all
	itemText                  // what belongs to no frame
	itemLong                  // the beginning of a frame that is too long
	itemXON
	itemXOFF
)

// decoder splits a stream into frames and what is between them. It keeps no more
// than one frame, and what it finds does not depend on how the stream is cut into
// pieces, except for the number of blanks.
type decoder struct {
	max int
	// strict takes only those for frames that directly follow a delimiter, as
	// mos does: in front of others the original skips what is no brace.
	strict bool
	// emit gets what is found. It owns frames; the rest is valid during the call.
	emit func(item, []byte)

	buf    []byte // of the segment since the last delimiter
	size   int    // of the last frame: how much to allocate for the next one
	quotes int    // at the end of buf, or skipped; never 3
	state  uint8
	old    bool // three quotes have been seen
	feedNL bool // the last delimiter was a line feed after nothing, in this feed
}

// The states of a decoder, within a segment.
const (
	stateText uint8 = iota // a frame may begin
	stateLate              // more text than is kept: no frame begins any more if strict
	stateBody              // in a frame
	stateLost              // in a frame that is damaged or too long
)

// quiet returns how many bytes at the start of b are certainly characters
// without a meaning for the decoder: no quotes, control characters or non-ASCII.
func quiet(b []byte) int {
	const ones, high = 0x0101010101010101, 0x8080808080808080
	zero := func(x uint64) uint64 { return (x - ones) &^ x & high }
	n := 0
	for len(b)-n >= 8 {
		x := binary.LittleEndian.Uint64(b[n:])
		if x&high|zero(x^'"'*ones)|(x-' '*ones)&^x&high != 0 {
			break
		}
		n += 8
	}
	return n
}

// feed decodes the next bytes of the stream.
func (d *decoder) feed(b []byte) {
	d.feedNL = false
	for i := 0; i < len(b); i++ {
		if d.state == stateBody || d.state == stateLost {
			if n := quiet(b[i:]); n > 0 {
				d.quotes = 0
				d.body(b[i : i+n])
				if i += n; i == len(b) {
					return
				}
			}
		}
		c := b[i]
		switch c {
		case xon:
			d.emit(itemXON, nil)
			continue
		case xoff:
			d.emit(itemXOFF, nil)
			continue
		case '\n':
			d.segment(false)
			continue
		case '"':
			if d.quotes++; d.quotes == 3 {
				if len(d.buf) >= 2 && d.state != stateLost {
					d.buf = d.buf[:len(d.buf)-2]
				}
				d.old = true
				d.segment(true)
				continue
			}
		default:
			d.quotes = 0
		}
		switch d.state {
		case stateText, stateLate:
			if c == '{' && (!d.strict || len(d.buf) == 0 && d.state == stateText) {
				d.text()
				d.buf = append(make([]byte, 0, d.size), c)
				d.state = stateBody
				continue
			}
			if len(d.buf) >= maxText && d.quotes == 0 {
				d.text()
				d.state = stateLate
			}
			d.buf = append(d.buf, c)
		case stateBody:
			switch {
			case c >= 0x80, c < ' ' && c != '\t' && c != '\r':
				// Damaged. The rest is not looked at, because part of a frame
				// could look like another frame.
				d.lose()
			default:
				d.body(b[i : i+1])
			}
		}
	}
}

// body adds to a frame.
func (d *decoder) body(b []byte) {
	if d.state == stateLost {
		return
	}
	if len(d.buf)+len(b) > d.max+maxMeta {
		d.tooLong()
		return
	}
	d.buf = append(d.buf, b...)
}

func (d *decoder) tooLong() {
	d.emit(itemLong, d.buf[:min(len(d.buf), maxText)])
	d.buf, d.state = nil, stateLost
}

// lose drops a damaged frame: it is text, if anything.
func (d *decoder) lose() {
	d.emit(itemText, d.buf[:min(len(d.buf), maxText)])
	d.buf, d.state = nil, stateLost
}

// text hands out the text before a frame.
func (d *decoder) text() {
	if len(bytes.TrimSpace(d.buf)) > 0 {
		d.emit(itemText, d.buf)
	}
	d.buf = d.buf[:0]
}

// pause says that nothing has come for a while: what there is of a frame will
// stay alone.
func (d *decoder) pause() {
	if d.state == stateBody || len(d.buf) > 0 {
		d.emit(itemText, d.buf[:min(len(d.buf), maxText)])
	}
	d.buf, d.state, d.quotes = nil, stateText, 0
}

// segment ends the segment in buf, at three quotes or a line feed.
func (d *decoder) segment(quotes bool) {
	b, state := d.buf, d.state
	lineEnd := d.feedNL
	d.state, d.quotes, d.feedNL = stateText, 0, false
	if state != stateBody {
		t := bytes.TrimSpace(b)
		d.buf = b[:0]
		switch {
		case state != stateText:
			d.buf = nil
			if len(t) > 0 {
				d.emit(itemText, b)
			}
		case len(t) == 0:
			d.feedNL = !quotes
			// A line feed before three quotes is part of one delimiter.
			if !quotes || !lineEnd {
				d.emit(itemBlank, nil)
			}
		case len(t) == 1 && t[0] == eot:
			d.emit(itemHandshake, nil)
		default:
			d.emit(itemText, bytes.TrimRight(b, "\r"))
		}
		return
	}
	d.buf = nil
	end := bytes.LastIndexByte(b, '}') + 1
	it := itemFrame
	if end > 0 {
		meta := bytes.TrimSpace(b[end:])
		if len(meta) > 0 {
			it = itemChecked
			if !checkCRC(b[:end], meta) {
				end = 0
			}
		}
	}
	switch {
	case end == 0:
		d.emit(itemText, b[:min(len(b), maxText)])
	case end > d.max:
		d.emit(itemLong, b[:min(len(b), maxText)])
	default:
		d.size = min(cap(b), 2*end)
		d.emit(it, b[:end])
	}
}

// flush ends the stream: a frame may end with it.
func (d *decoder) flush() {
	if d.state == stateBody || len(d.buf) > 0 {
		d.segment(false)
	}
}

// checkCRC reports whether what follows a frame is its checksum, perhaps followed
// by more after a comma. Less than a checksum is a damaged one: the original lets
// that pass.
func checkCRC(frame, meta []byte) bool {
	if len(meta) < 8 || len(meta) > 8 && meta[8] != ',' {
		return false
	}
	for _, c := range meta[:8] {
		if !isHex(c) {
			return false
		}
	}
	v, err := strconv.ParseUint(string(meta[:8]), 16, 32)
	return err == nil && uint32(v) == crc32.ChecksumIEEE(frame)
}

// shape says how frames are written.
type shape struct{ quotes, crc bool }

// appendFrame appends a frame, which is made ASCII, with its delimiters.
func appendFrame(dst, frame []byte, s shape) []byte {
	dst = append(dst, '\n')
	if s.quotes {
		dst = append(dst, oldDelimiter...)
	}
	start := len(dst)
	dst = appendASCII(dst, bytes.TrimSpace(frame))
	if s.crc {
		const hex = "0123456789abcdef"
		v := crc32.ChecksumIEEE(dst[start:])
		for i := 28; i >= 0; i -= 4 {
			dst = append(dst, hex[v>>i&15])
		}
	}
	if s.quotes {
		dst = append(dst, oldDelimiter...)
	}
	return append(dst, '\n')
}

// Errors of streams.
var (
	errSlowPeer = errors.New("the other side does not take what it is sent")
	errIdle     = errors.New("nothing came for too long")
)

// stream is a byte stream that carries frames, seen from either side.
type stream struct {
	rwc  io.ReadWriteCloser
	o    StreamOptions
	busy chan struct{} // holds an element while somebody writes
	slow atomic.Bool   // closed because of a slow peer
	used time.Time     // when something last came that is no noise; of the goroutine that reads

	mu   sync.Mutex
	hold chan struct{} // closed by XON; nil without XOFF
}

func newStream(rwc io.ReadWriteCloser, o StreamOptions) *stream {
	return &stream{rwc: rwc, o: o, busy: make(chan struct{}, 1)}
}

// write writes b as a whole: nothing else comes between.
func (s *stream) write(ctx context.Context, b []byte) error {
	select {
	case s.busy <- struct{}{}:
		defer func() { <-s.busy }()
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	size := readSize
	if s.o.FlowControl {
		size = 64 // not much comes after an XOFF
	}
	if s.o.PieceSize > 0 {
		size = s.o.PieceSize
	}
	for len(b) > 0 {
		if err := s.waitXON(ctx); err != nil {
			return err
		}
		n := min(size, len(b))
		if err := s.writeRaw(b[:n]); err != nil {
			s.rwc.Close() // somewhere within a frame
			return err
		}
		b = b[n:]
		if s.o.PieceSize > 0 && s.o.PieceDelay > 0 && len(b) > 0 {
			if err := sleep(ctx, s.o.PieceDelay); err != nil {
				return err
			}
		}
	}
	return nil
}

// writeRaw writes b, which is short. It closes the stream if that takes too long.
func (s *stream) writeRaw(b []byte) error {
	t := time.AfterFunc(s.o.WriteTimeout, func() {
		s.slow.Store(true)
		s.rwc.Close()
	})
	n, err := s.rwc.Write(b)
	t.Stop()
	switch {
	case err != nil && s.slow.Load():
		return errSlowPeer
	case err == nil && n < len(b):
		return io.ErrShortWrite
	}
	return err
}

// sleep waits for d, or until ctx ends.
func sleep(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// waitXON waits while the other side does not want to be sent anything.
func (s *stream) waitXON(ctx context.Context) error {
	s.mu.Lock()
	hold := s.hold
	s.mu.Unlock()
	if hold == nil {
		return nil
	}
	t := time.NewTimer(s.o.XOFFTimeout)
	defer t.Stop()
	select {
	case <-hold:
	case <-t.C:
		s.flow(true)
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	return nil
}

// flow notes an XON, or an XOFF.
func (s *stream) flow(on bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case on && s.hold != nil:
		close(s.hold)
		s.hold = nil
	case !on && s.hold == nil && s.o.FlowControl:
		s.hold = make(chan struct{})
	}
}

// read decodes what comes until the end of the stream, which is no error. idle is
// asked whether the stream may be closed for having nothing to do; nil means never.
func (s *stream) read(d *decoder, idle func() bool) error {
	dl, _ := s.rwc.(interface{ SetReadDeadline(time.Time) error })
	if s.o.IdleTimeout <= 0 || idle == nil {
		dl = nil
	}
	buf := make([]byte, readSize)
	empty := 0 // reads in a row without anything
	s.used = time.Now()
	for {
		start := time.Now()
		if dl != nil {
			_ = dl.SetReadDeadline(s.used.Add(s.o.IdleTimeout))
		}
		n, err := s.rwc.Read(buf)
		// How long the frame before was served is no matter: only reading counts.
		if time.Since(start) > s.o.FrameTimeout {
			d.pause()
			empty = 0
		}
		d.feed(buf[:n])
		var timeout interface{ Timeout() bool }
		switch {
		case err == io.EOF:
			d.flush()
			return nil
		case err != nil && dl != nil && errors.As(err, &timeout) && timeout.Timeout():
			if idle() {
				return errIdle
			}
			s.used = time.Now()
		case err != nil && s.slow.Load():
			return errSlowPeer
		case err != nil:
			return err
		case n > 0:
			empty = 0
		default:
			if empty++; empty > 1000 {
				return io.ErrNoProgress
			}
		}
	}
}

// ServeStream serves the frames that come on rwc until it ends, which is no error,
// and closes it. It also returns, with the cause, when ctx ends or the server is
// closed, or when rwc fails or its other side does not take what it is sent; Close
// of rwc must then make its Read and Write return. Calls under way are answered
// first if rwc has come to its end.
//
// Noise, damaged frames and text between frames are skipped. Calls are served
// concurrently, so a client that cares for their order waits for the reply. peer
// describes the other side; its Channel is UART if it has none. o may be nil.
//
// Whoever can write to rwc is a peer for the [Authorizer]: frames on a stream
// carry credentials, if any, in their auth member.
func (s *Server) ServeStream(ctx context.Context, rwc io.ReadWriteCloser, peer Peer, o *StreamOptions) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer context.AfterFunc(s.ctx, func() { cancel(ErrClosed) })()
	if peer.Channel == "" {
		peer.Channel = "UART"
	}
	if err := s.Admit(ctx, &peer); err != nil {
		cancel(nil)
		return errors.Join(fmt.Errorf("rpcjson: %s %s: %w", peer.Channel, printable(peer.Addr), err), rwc.Close())
	}
	c := &streamConn{s: s, ctx: ctx, peer: peer, stream: newStream(rwc, o.complete(s.o.MaxFrame))}
	c.calls = make(chan struct{}, c.o.MaxCalls)
	c.d = decoder{max: c.o.MaxFrame, emit: c.item}
	closed := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(closed)
		rwc.Close()
	})

	err := c.read(&c.d, func() bool { return len(c.calls) == 0 })
	if err == nil {
		// Perhaps only its sending side is closed.
		t := time.AfterFunc(c.o.WriteTimeout, func() { cancel(nil) })
		c.wg.Wait()
		t.Stop()
	}
	if ctx.Err() != nil && err != nil {
		err = context.Cause(ctx)
	}
	cancel(nil)
	c.wg.Wait()
	if stop() {
		rwc.Close()
	} else {
		<-closed
	}
	if err != nil && !errors.Is(err, ErrClosed) {
		return fmt.Errorf("rpcjson: %s %s: %w", peer.Channel, printable(peer.Addr), err)
	}
	return err
}

// streamConn is a stream that is being served.
type streamConn struct {
	*stream
	s     *Server
	ctx   context.Context
	peer  Peer
	d     decoder
	calls chan struct{} // one element for each call being served
	wg    sync.WaitGroup
	crc   bool // a frame with a good checksum has come
	blank int  // line feeds to be sent with the next frame
}

// item does what is to be done about what came.
func (c *streamConn) item(it item, b []byte) {
	switch it {
	case itemXON, itemXOFF:
		c.flow(it == itemXON)
	case itemText:
		if c.o.Text != nil {
			c.o.Text(b)
		}
	case itemBlank:
		c.blank = min(c.blank+1, 16)
	case itemHandshake:
		c.used = time.Now()
		c.flow(true) // it is listening
		head := c.head() + handshake
		c.start(func() { c.write(c.ctx, []byte(head)) })
	case itemLong:
		// A definite answer, if only it can be seen to what.
		f, err := parseFrame(b, c.s.o.MaxDepth)
		if err == nil && f.id != "" && f.method != "" && (f.dst == "" || f.dst == c.s.o.ID) {
			reply := appendReply(nil, &f, c.s.o.ID, nil, errorf(413, "frame of more than %d bytes", c.d.max))
			send := c.sender()
			c.start(func() { send(reply) })
		}
	case itemFrame, itemChecked:
		c.used = time.Now()
		c.crc = c.crc || it == itemChecked
		send := c.sender()
		f, err := c.s.parse(b)
		switch {
		case err != nil:
			c.s.log.Debug("rpc: frame ignored", "channel", c.peer.Channel, "peer", c.peer.Addr, "err", err)
			return
		case f.method == "":
			return // an answer to something that was never asked
		case it == itemFrame && c.o.NeedCRC && strings.EqualFold(f.method, "OTA.Write"):
			if f.id != "" {
				reply := appendReply(nil, &f, c.s.o.ID, nil, errorf(400, "OTA.Write needs a checksum on this line"))
				c.start(func() { send(reply) })
			}
			return
		}
		c.start(func() {
			peer := c.peer
			if err := c.s.serve(c.ctx, &peer, &f, send, c.s.acquireSoon(c.ctx)); err != nil {
				c.s.log.Debug("rpc: frame not answered", "channel", c.peer.Channel, "peer", c.peer.Addr, "err", err)
			}
		})
	}
}

// head returns the line feeds that answer what was blank.
func (c *streamConn) head() string {
	n := c.blank
	c.blank = 0
	return strings.Repeat("\n", n)
}

// sender returns a function that sends the reply to what has just come, in a shape
// that the client understands.
func (c *streamConn) sender() func(reply []byte) error {
	head := c.head()
	sh := shape{quotes: c.d.old, crc: c.crc || c.o.CRC}
	return func(reply []byte) error {
		b := append(make([]byte, 0, len(head)+len(reply)+32), head...)
		return c.write(c.ctx, appendFrame(b, reply, sh))
	}
}

// start runs f in a goroutine, once there is a place for it.
func (c *streamConn) start(f func()) {
	select {
	case c.calls <- struct{}{}:
	default:
		held := c.o.FlowControl && c.writeRaw([]byte{xoff}) == nil
		select {
		case c.calls <- struct{}{}:
		case <-c.ctx.Done():
			return
		}
		if held {
			_ = c.writeRaw([]byte{xon})
		}
	}
	c.wg.Go(func() {
		defer func() { <-c.calls }()
		f()
	})
}

// errTooLongReply is the error for replies longer than a client takes.
func errTooLongReply(max int) error {
	return fmt.Errorf("reply of more than %d bytes: %w", max, ota.ErrTooLarge)
}
