package rpcjson

import (
	"context"
	"crypto/sha256"
	"io"
	"math"
	"sync"
	"time"
)

// push is a session of OTA.Begin, OTA.Write and OTA.End: a pipe from the calls to
// the update, which reads it as a firmware file. It stays after its end, so that
// the result can be asked for again.
type push struct {
	update
	begin begin
	ctx   context.Context // of the update; set before it reads
	queue chan *chunk     // to the reader; never holds more than one
	eof   chan struct{}   // closed by OTA.End

	cur *chunk // being read; the reader's alone

	mu    sync.Mutex
	next  int64  // offset expected
	last  *chunk // newest accepted; nil at first
	ended bool
}

// begin is what OTA.Begin was told, beside the size.
type begin struct {
	stall  time.Duration
	commit time.Duration
}

// chunk is the data of one OTA.Write.
type chunk struct {
	off  int64
	size int
	sum  [sha256.Size]byte
	rest []byte        // not yet read
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
			p.cur.rest = nil // it is remembered, its data need not be
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
	if err := r.Args.Err(); err != nil {
		return nil, err
	}
	b := begin{stall, o.CommitTimeout}
	if p := s.session(); p != nil && p.begin == b && p.size.Load() == size && !p.over() && p.fresh() {
		return nil, nil // the reply to the first one was lost
	}
	p := &push{
		begin: b,
		queue: make(chan *chunk, 1),
		eof:   make(chan struct{}),
	}
	p.push = p
	p.size.Store(size)
	err := s.install(&p.update, o, endAnyway, func(ctx context.Context) (io.ReadCloser, error) {
		p.ctx = ctx
		return p, nil
	})
	return nil, failed(-1, "Update failed to start", err)
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
	data, given := r.Args.Bytes("data")
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
	c, err := p.accept(off, data)
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

// accept hands data to the update and returns the chunk to wait for: a new one,
// or the one that data repeats; nil if there is nothing to wait for.
func (p *push) accept(off int64, data []byte) (*chunk, error) {
	sum := sha256.Sum256(data)
	p.mu.Lock()
	defer p.mu.Unlock()
	l := p.last
	switch {
	case l != nil && off == l.off:
		if len(data) != l.size || sum != l.sum {
			return nil, errorf(-1, "offset %d was already written with other data", off)
		}
		return l, nil
	case off != p.next:
		return nil, errorf(-1, "Expected offset %d, got %d", p.next, off)
	case p.over():
		return nil, p.failure(-1)
	case p.ended:
		return nil, errorf(-1, "OTA.End was already called")
	case len(data) == 0:
		return nil, nil
	}
	c := &chunk{off: off, size: len(data), sum: sum, rest: data, done: make(chan struct{})}
	select {
	case p.queue <- c:
	default:
		return nil, errorf(-1, "one OTA.Write at a time")
	}
	p.last, p.next = c, p.next+int64(len(data))
	return c, nil
}

func (s *Server) otaEnd(ctx context.Context, r *Request) (any, error) {
	u := s.current()
	switch {
	case u != nil && u.push != nil:
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
