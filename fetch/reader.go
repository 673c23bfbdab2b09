package fetch

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math"
	"math/rand/v2"
	"time"

	"github.com/slotota/ota"
)

// reader reads ranges of a remote file, one after another.
type reader struct {
	w      *remote
	ctx    context.Context
	cancel context.CancelCauseFunc
	t      retrier
	open   bool // rs is the whole file, the size of which is not known

	turn chan struct{} // has room for whoever uses what follows: Read, or Close

	rs  []ota.Range
	err error // what every further Read returns

	body *body // what is being read, or nil
	span int   // how many of rs it has the bytes of
	gave bool  // some of them were read
	junk []byte

	next   chan answer // the request made ahead of time, or nil
	nextAt int64       // what is asked for begins there
}

// answer is what came of a request that was made ahead of time.
type answer struct {
	b   *body
	err error
}

// Close ends the reading, also one that is under way, and leaves no goroutine
// behind.
func (r *reader) Close() error {
	r.cancel(fs.ErrClosed)
	r.turn <- struct{}{}
	r.fail(fs.ErrClosed)
	<-r.turn
	return nil
}

// fail ends the reading with err, if it has not ended.
func (r *reader) fail(err error) {
	if r.err != nil {
		return
	}
	if err != io.EOF {
		err = r.w.file.wrap(err)
	}
	r.err = err
	r.cancel(nil)
	r.drop()
	if r.next != nil {
		r.forget()
	}
}

// forget waits for the request made ahead of time and drops what came of it.
func (r *reader) forget() {
	if a := <-r.next; a.b != nil {
		a.b.close()
	}
	r.next = nil
}

// drop closes the body.
func (r *reader) drop() {
	if r.body != nil {
		r.body.close()
		r.body = nil
	}
}

func (r *reader) Read(p []byte) (int, error) {
	r.turn <- struct{}{}
	defer func() { <-r.turn }()
	if len(p) == 0 {
		return 0, nil
	}
	for r.err == nil {
		n, err := r.step(p)
		if err != nil {
			r.fail(err)
		}
		if n > 0 {
			return n, nil
		}
	}
	return 0, r.err
}

// step goes on by some bytes, or by a connection.
func (r *reader) step(p []byte) (int, error) {
	if r.ctx.Err() != nil {
		return 0, context.Cause(r.ctx)
	}
	if err := r.leave(); err != nil {
		return 0, err
	}
	if len(r.rs) == 0 {
		return 0, io.EOF
	}
	want := r.rs[0]
	if want.Off < int64(len(r.w.head)) {
		n := copy(p[:min(int64(len(p)), want.Len)], r.w.head[want.Off:])
		r.take(n)
		return n, nil
	}
	if r.body == nil {
		b, err := r.connect()
		if err != nil {
			return 0, r.t.again(r.ctx, err)
		}
		r.body = b
	}
	skip := want.Off - r.body.at
	switch {
	case skip > r.w.o.MaxSkip && !r.body.partial:
		return 0, because(ErrNoRanges, "%d bytes to skip, at most %d", skip, r.w.o.MaxSkip)
	case skip > 0:
		if r.junk == nil {
			r.junk = make([]byte, scratchSize)
		}
		p = r.junk[:min(skip, scratchSize)]
	default:
		p = p[:min(int64(len(p)), want.Len)]
	}
	n, err := r.body.read(p, &r.t)
	if err == io.EOF { // of a file of unknown size
		r.rs, r.span = nil, 0
		return 0, nil
	}
	if err != nil {
		r.drop()
		if want.Off > 0 && !r.w.ent.resumable() {
			return 0, settled(err)
		}
		if t, ok := err.(*temporary); ok && !r.gave && t.error != ErrStalled {
			t.vague = true
		}
		return 0, r.t.again(r.ctx, err)
	}
	r.ahead()
	if skip > 0 {
		return 0, nil
	}
	r.gave = r.gave || n > 0
	r.take(n)
	if r.open && want.Off+int64(n) > r.w.o.MaxSize {
		return 0, because(ErrTooLarge, "more than %d bytes", r.w.o.MaxSize)
	}
	return n, nil
}

// take counts n bytes as read.
func (r *reader) take(n int) {
	w := &r.rs[0]
	w.Off, w.Len = w.Off+int64(n), w.Len-int64(n)
	if w.Len == 0 {
		r.rs = r.rs[1:]
		r.span = max(r.span-1, 0)
	}
}

// leave closes a body that has nothing more to give.
func (r *reader) leave() error {
	b := r.body
	if b == nil {
		return nil
	}
	if b.end < 0 || b.at < b.end {
		if len(r.rs) == 0 || r.span == 0 && b.partial {
			r.drop()
		}
		return nil
	}
	if r.open && b.at >= b.ent.size {
		r.rs, r.span = nil, 0 // now the end is known
	}
	err := b.finish(&r.t)
	r.drop()
	if err == nil && r.span > 0 && b.end-b.from < recovered {
		// Less than was asked for is allowed, but may be next to nothing.
		err = r.t.again(r.ctx, &temporary{error: io.ErrUnexpectedEOF})
	}
	return err
}

// extent returns the end of what to ask for to get the first of rs, and how many
// of rs that has.
func (r *reader) extent(rs []ota.Range) (end int64, n int) {
	if r.open {
		return -1, 1
	}
	for n = range rs {
		if n > 0 && rs[n].Off-end > r.w.o.Gap {
			return end, n
		}
		end = rs[n].Off + rs[n].Len
	}
	return end, len(rs)
}

// connect gets a body with the next bytes.
func (r *reader) connect() (*body, error) {
	off := r.rs[0].Off
	end, n := r.extent(r.rs)
	r.span, r.gave = n, false
	began := time.Now()
	var a answer
	if r.next != nil && r.nextAt < off {
		r.forget() // a server that sent everything has made it needless
	}
	if r.next != nil && r.nextAt == off {
		a = <-r.next
		r.next = nil
	} else {
		a.b, a.err = r.w.get(r.ctx, off, end, r.t.window())
	}
	r.t.spent(0, time.Since(began))
	return a.b, a.err
}

// ahead makes the next request if it is time for it. That hides the time that an
// answer takes, which for small ranges is most of all time.
func (r *reader) ahead() {
	b := r.body
	if r.next != nil || !b.partial || b.end-b.at > readAhead || r.span >= len(r.rs) {
		return
	}
	off := r.rs[r.span].Off
	end, _ := r.extent(r.rs[r.span:])
	next, window := make(chan answer, 1), r.t.window()
	r.next, r.nextAt = next, off
	go func() {
		b, err := r.w.get(r.ctx, off, end, window)
		next <- answer{b, err}
	}()
}

// retrier decides whether and when to try again.
type retrier struct {
	w      *remote
	limit  int           // attempts, if not 0
	failed int           // attempts in a row
	vague  int           // as many of them were vague
	got    int64         // bytes since the last one
	lost   time.Duration // waited in this row and since the last byte before it
}

// spent notes what n bytes took.
func (t *retrier) spent(n int, d time.Duration) {
	t.lost += d
	t.got += int64(n)
	if n > 0 && (t.failed == 0 || t.got >= recovered) {
		t.failed, t.vague, t.got, t.lost = 0, 0, 0, 0
	}
}

// left is how long to go on without success.
func (t *retrier) left() time.Duration {
	if o := t.w.o; o.RetryFor > 0 && t.failed > 0 {
		return max(o.RetryFor-t.lost, 0)
	}
	return math.MaxInt64
}

// window is how long to wait for an answer.
func (t *retrier) window() time.Duration {
	w := min(t.w.o.StallTime, t.left())
	if t.w.o.RetryFor > 0 {
		w = min(w, t.w.o.RetryFor)
	}
	return w
}

// again waits until the next attempt after err, or returns an error if there is
// none.
func (t *retrier) again(ctx context.Context, err error) error {
	var again *temporary
	if !errors.As(err, &again) {
		return err
	}
	o := t.w.o
	t.failed++
	t.got = 0
	if again.vague {
		t.vague++
	}
	delay := min(minDelay<<min(t.failed-1, 10), maxDelay)
	delay -= rand.N(delay / 2)
	delay = max(delay, again.after)
	err = again.error
	switch {
	case o.RetryFor < 0:
		return err
	case delay > o.RetryFor-t.lost, t.limit > 0 && t.failed >= t.limit, t.vague >= vagueAttempts:
		var e *Error
		if errors.As(err, &e) {
			return &Error{URL: e.URL, Err: fmt.Errorf("%w (attempt %d)", e.Err, t.failed)}
		}
		return fmt.Errorf("%w (attempt %d)", err, t.failed)
	}
	o.Retrying(t.w.file.wrap(err), delay)
	timer := time.NewTimer(delay)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	t.lost += delay
	t.w.file.retries.Add(1)
	return nil
}
