package rpcjson

import (
	"context"
	"hash/maphash"
	"io"
	"math"
	"sync"
	"time"

	"github.com/slotota/ota/internal/link"
)

// push is a session of OTA.Begin, OTA.Write and OTA.End: a pipe from the calls to
// the update, which reads it as a firmware file. It stays after its end, so that
// the result can be asked for again.
type push struct {
	update
	owner *owner
	begin begin
	seed  maphash.Seed
	spare *link.Buffers   // for data
	ctx   context.Context // of the update; set before it reads
	queue chan *chunk     // to the reader
	eof   chan struct{}   // closed by OTA.End

	cur *chunk // being read; the reader's alone

	mu    sync.Mutex
	next  int64         // offset expected
	last  *chunk        // newest accepted; nil at first
	moved chan struct{} // closed when next changes
	early int           // calls that wait for that
	ended bool
}

// begin is what OTA.Begin was told, beside the size.
type begin struct {
	stall  time.Duration
	commit time.Duration
	window int // how many calls of OTA.Write may be under way
}

// maxWindow is the largest window of a push: the update takes one chunk, one is being
// received and one made. More were slower, as they exceed the processor's caches.
const maxWindow = 3

// earlyFor bounds how long data waits for what is before it.
const earlyFor = 5 * time.Second

// chunk is the data of one OTA.Write.
type chunk struct {
	off  int64
	size int
	sum  uint64        // of its data, to know it if it comes again
	data []byte        // until it has been read
	rest []byte        // of data, not yet read
	done chan struct{} // closed when the update has consumed it
}

// Read implements io.Reader for the update.
func (p *push) Read(b []byte) (int, error) {
	if len(b) == 0 {
		return 0, nil
	}
	for p.cur == nil || len(p.cur.rest) == 0 {
		if p.cur != nil {
			// The update wants more, so it is done with this one.
			p.spare.Put(p.cur.data)
			p.cur.data, p.cur.rest = nil, nil // it is remembered, its data need not be
			close(p.cur.done)
			p.cur = nil
		}
		c, err := p.receive()
		if err != nil {
			return 0, err
		}
		p.cur = c
	}
	n := copy(b, p.cur.rest)
	p.cur.rest = p.cur.rest[n:]
	p.taken.Add(int64(n))
	return n, nil
}

// receive waits for the next chunk. The time limit runs only here: slow flash is
// no reason to give up.
func (p *push) receive() (*chunk, error) {
	t := time.NewTimer(p.begin.stall)
	defer t.Stop()
	select {
	case c := <-p.queue:
		return c, nil
	case <-p.eof:
		select {
		case c := <-p.queue: // came before the end
			return c, nil
		default:
			return nil, io.EOF
		}
	case <-t.C:
		return nil, errTimedOut
	case <-p.ctx.Done():
		return nil, context.Cause(p.ctx)
	}
}

// Close implements io.Closer for the update.
func (p *push) Close() error { return nil }

// current returns the update under way or the last one, nil if there was none.
func (s *Server) current() *update {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.update
}

// session returns the push session under way or the last one, nil if there was
// none or an OTA.Update came after it.
func (s *Server) session() *push {
	if u := s.current(); u != nil {
		return u.push
	}
	return nil
}

func (s *Server) otaBegin(_ context.Context, r *Request) (any, error) {
	stall, o := s.times(r.Args)
	size, _ := r.Args.Int("size", 0, math.MaxInt64/100)
	window, _ := r.Args.Int("window", 0, math.MaxInt64) // not among the arguments of the original
	if err := r.Args.Err(); err != nil {
		return nil, err
	}
	b := begin{stall, o.CommitTimeout, int(max(1, min(window, maxWindow)))}
	var res any
	if window > 0 {
		res = object("window", int64(b.window))
	}
	if p := s.session(); p != nil && p.begin == b && p.size.Load() == size && !p.over() && p.fresh() {
		leave, err := s.enter(p, r)
		if err == nil {
			leave()
		}
		return res, err // nil: the reply to the first one was lost
	}
	p := &push{
		owner: newOwner(r),
		begin: b,
		seed:  maphash.MakeSeed(),
		spare: &s.chunks,
		queue: make(chan *chunk, b.window),
		moved: make(chan struct{}),
		eof:   make(chan struct{}),
	}
	p.push = p
	p.size.Store(size)
	err := s.install(&p.update, o, endAnyway, func(ctx context.Context) (io.ReadCloser, error) {
		p.ctx = ctx
		return p, nil
	})
	return res, failed(-1, "Update failed to start", err)
}

// fresh reports whether no data has come yet.
func (p *push) fresh() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.last == nil && !p.ended
}

// expected returns the offset of the data that is to come next.
func (p *push) expected() int64 {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.next
}

var errNotStarted = errorf(-1, "Update not started")

func (s *Server) otaWrite(ctx context.Context, r *Request) (any, error) {
	p := s.session()
	if p == nil {
		return nil, errNotStarted
	}
	if p.over() && p.code != resultOK {
		return nil, p.failure(-1)
	}
	leave, err := s.enter(p, r)
	if err != nil {
		return nil, err
	}
	defer leave()
	data, given := r.Args.decode("data", p.spare.Get)
	if r.Args.Err() == nil && !given {
		return nil, errorf(-1, "Data required")
	}
	off, given := r.Args.Int("offset", math.MinInt64, math.MaxInt64)
	if !given {
		off = -1
	}
	if err := r.Args.Err(); err != nil {
		return nil, err
	}
	if err := p.await(ctx, off, maxWindow*int64(s.o.MaxFrame)); err != nil {
		p.spare.Put(data)
		return nil, err
	}
	c, mine, err := p.accept(off, data)
	if !mine {
		p.spare.Put(data)
	}
	if err != nil || c == nil {
		return nil, err
	}
	select {
	case <-c.done:
		return nil, nil
	case <-p.done:
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	select {
	case <-c.done:
		return nil, nil
	default:
	}
	if p.code == resultOK {
		return nil, nil
	}
	return nil, p.failure(p.code)
}

// await waits until the data before off has come: in a session with a window it may
// be in a call that this one has overtaken. It is max bytes at most.
func (p *push) await(ctx context.Context, off, max int64) error {
	p.mu.Lock()
	// As many as the window, though one call has what is missing: another may have
	// got that already and not have left yet.
	early := p.begin.window > 1 && off > p.next && off-p.next <= max && p.early < p.begin.window
	if early {
		p.early++
	}
	p.mu.Unlock()
	if !early {
		return nil
	}
	defer func() {
		p.mu.Lock()
		defer p.mu.Unlock()
		p.early--
	}()
	t := time.NewTimer(earlyFor)
	defer t.Stop()
	for {
		p.mu.Lock()
		moved, come := p.moved, p.next >= off
		p.mu.Unlock()
		if come {
			return nil
		}
		select {
		case <-moved:
		case <-p.eof:
			return nil
		case <-p.done:
			return nil
		case <-t.C:
			return nil
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// accept hands data to the update, which then owns it, and returns the chunk to
// wait for: a new one, or the one that data repeats; nil if there is nothing to
// wait for.
func (p *push) accept(off int64, data []byte) (c *chunk, taken bool, err error) {
	sum := maphash.Bytes(p.seed, data)
	p.mu.Lock()
	defer p.mu.Unlock()
	l := p.last
	switch {
	case l != nil && off == l.off:
		if len(data) != l.size || sum != l.sum {
			return nil, false, errorf(-1, "offset %d was already written with other data", off)
		}
		return l, false, nil
	case off != p.next:
		return nil, false, errorf(-1, "Expected offset %d, got %d", p.next, off)
	case p.over():
		return nil, false, p.failure(-1)
	case p.ended:
		return nil, false, errorf(-1, "OTA.End was already called")
	case len(data) == 0:
		return nil, false, nil
	}
	size := len(data)
	c = &chunk{off: off, size: size, sum: sum, data: data, rest: data, done: make(chan struct{})}
	select {
	case p.queue <- c:
	default:
		return nil, false, errorf(-1, "one OTA.Write at a time")
	}
	p.last, p.next = c, p.next+int64(size)
	close(p.moved)
	p.moved = make(chan struct{})
	return c, true, nil
}

func (s *Server) otaEnd(ctx context.Context, r *Request) (any, error) {
	u := s.current()
	switch {
	case u != nil && u.push != nil:
		leave, err := s.enter(u.push, r)
		if err != nil {
			return nil, err
		}
		defer leave()
		u.push.end()
	case u != nil && !u.over():
		u.cancel(errEnded) // also the way to abort an OTA.Update
	default:
		return nil, errNotStarted
	}
	select {
	case <-u.done:
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	if u.code != resultOK {
		return nil, u.failure(-1)
	}
	r.after = func() { s.rebootSooner(updateDelay) }
	return s.status(u), nil
}

// end marks the end of the data.
func (p *push) end() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if !p.ended {
		p.ended = true
		close(p.eof)
	}
}
