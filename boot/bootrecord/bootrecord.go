package bootrecord

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/bits"
	"reflect"
	"slices"
	"sync"

	"github.com/slotota/ota"
)

// MaxCopies is the largest number of copies of a record.
const MaxCopies = 8

// readTries is how often a copy is read at most until a read succeeds.
const readTries = 3

// lostGeneration is where generations go on if none can be read any more, so
// that no old copy which comes back is taken for the newest.
const lostGeneration = 1 << 32

// ErrVersion says that a copy holds a sound record of another major version of
// the format. Such a copy is never overwritten.
var ErrVersion = errors.New("boot record of another major version")

var errBlank = errors.New("blank")

// Options configure a [Record]. The zero value is safe.
type Options struct {
	// Running returns the slot whose firmware executes now, found out from
	// the device. nil makes [Record.Running] return ota.ErrUnsupported, which
	// is enough for a boot stage.
	Running func(ctx context.Context) (ota.SlotID, error)
}

// Record is a boot record. It is an [ota.Bootloader] and an [ota.Healer]. All
// methods are safe for concurrent use; they wait for each other, or until their
// context is done.
type Record struct {
	places  []place
	running func(ctx context.Context) (ota.SlotID, error)

	sem chan struct{} // holds a token while the places are in use
	gen uint64        // highest generation read or written; owned by sem's holder

	mu     sync.Mutex
	health Health
}

// Health says how the copies of a record were found, or left, by the last call
// that used them.
type Health struct {
	Copies int     // number of copies
	Good   int     // how many hold the newest generation
	Errs   []error // what is wrong with each copy, nil if it is good; empty before the first call
}

// New returns the record whose copies are at the start of the given places, 2 to
// MaxCopies; 3 are recommended. K places tolerate K-2 damaged ones at a time, see
// the package documentation. Each has erase units of its own (see [ota.Region]
// and [Split]) and room for MaxSize bytes. Nothing is read or written yet. The
// error wraps ota.ErrInvalid.
func New(places []ota.Flash, o *Options) (*Record, error) {
	ps := make([]place, len(places))
	for i, f := range places {
		if f == nil {
			return nil, fmt.Errorf("bootrecord: copy %d: no flash: %w", i, ota.ErrInvalid)
		}
		for j, g := range places[:i] {
			if reflect.ValueOf(f).Comparable() && reflect.ValueOf(g).Comparable() && f == g {
				return nil, fmt.Errorf("bootrecord: copies %d and %d: same place: %w", j, i, ota.ErrInvalid)
			}
		}
		if _, err := placeEnd(f, 0); err != nil {
			return nil, fmt.Errorf("bootrecord: copy %d: %w", i, err)
		}
		ps[i] = &flashPlace{f}
	}
	return newRecord(ps, o)
}

func newRecord(places []place, o *Options) (*Record, error) {
	if len(places) < 2 || len(places) > MaxCopies {
		return nil, fmt.Errorf("bootrecord: %d copies: need 2 to %d: %w", len(places), MaxCopies, ota.ErrInvalid)
	}
	r := &Record{places: places, sem: make(chan struct{}, 1)}
	if o != nil {
		r.running = o.Running
	}
	return r, nil
}

// Running implements [ota.Bootloader] by Options.Running.
func (r *Record) Running(ctx context.Context) (ota.SlotID, error) {
	if r.running == nil {
		return ota.NoSlot, fmt.Errorf("bootrecord: running slot: %w", ota.ErrUnsupported)
	}
	return r.running(ctx)
}

// Health returns the state of the copies as of the last Load, Heal or Store.
func (r *Record) Health() Health {
	r.mu.Lock()
	defer r.mu.Unlock()
	h := r.health
	h.Copies = len(r.places)
	h.Errs = slices.Clone(h.Errs)
	return h
}

// acquire waits for the places.
func (r *Record) acquire(ctx context.Context) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	select {
	case r.sem <- struct{}{}:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (r *Record) release() { <-r.sem }

// Load implements [ota.Bootloader]. It writes nothing. Nothing was ever stored if
// all copies but one, or all, are blank: that is what a power cut leaves of the
// first store.
func (r *Record) Load(ctx context.Context) (ota.BootState, error) {
	if err := r.acquire(ctx); err != nil {
		return ota.BootState{}, err
	}
	defer r.release()
	cs, best, err := r.scan(ctx)
	if err != nil {
		return ota.BootState{}, err
	}
	return cs[best].rec.state, nil
}

// Heal implements [ota.Healer]. Once the state is known, Heal returns it without
// an error even if copies could not be rewritten, as a device that boots is
// better than one that does not; [Record.Health] tells about them.
func (r *Record) Heal(ctx context.Context) (ota.BootState, error) {
	if err := r.acquire(ctx); err != nil {
		return ota.BootState{}, err
	}
	defer r.release()
	cs, best, err := r.scan(ctx)
	if err != nil {
		return ota.BootState{}, err
	}
	for _, p := range r.places {
		p.tidy()
	}
	rec := *cs[best].rec
	bad, same := survey(cs)
	missing := r.missing(&rec)
	if same && bad == 0 && missing == 0 {
		return rec.state, nil
	}
	if err := ctx.Err(); err != nil {
		return ota.BootState{}, err
	}
	if same && bad != 0 && bad&^missing == 0 {
		// The other copies know about these. Leave them alone, or they would
		// wear out at every boot, unless one of these has recovered.
		if bad = r.retry(cs, best, bad); bad == missing {
			r.report(cs)
			return rec.state, nil
		}
	}
	rec.missing = 0
	switch {
	case bad != 0:
		// What cannot be read now may be a write that was cut off, of the next
		// generation or, see Store, the one after that. It must not win if it
		// can be read again one day.
		rec.gen += 3
	case missing != 0:
		rec.gen++
	}
	// Health tells about a failure.
	_ = r.write(cs, best, &rec)
	return rec.state, nil
}

// retry writes the newest record to the given copies and returns those which
// failed again.
func (r *Record) retry(cs []content, best int, copies uint8) (failed uint8) {
	for i := range cs {
		if copies&(1<<i) == 0 {
			continue
		}
		if err := r.replace(i, cs[best].raw); err != nil {
			cs[i].err = err
			failed |= 1 << i
		} else {
			cs[i] = cs[best]
		}
	}
	return failed
}

// Store implements [ota.Bootloader]. It returns nil once all copies, except for
// the number of damaged ones that the record tolerates, were written and read
// back. Strings beyond their limits are cut. It writes nothing if all copies hold s
// already.
func (r *Record) Store(ctx context.Context, s ota.BootState) error {
	rec := record{minor: Minor, gen: 1, state: fit(s)}
	if err := rec.check(); err != nil {
		return fmt.Errorf("bootrecord: %w: %w", err, ota.ErrInvalid)
	}
	if err := r.acquire(ctx); err != nil {
		return err
	}
	defer r.release()
	cs, best, err := r.scan(ctx)
	switch {
	case cs == nil || errors.Is(err, ErrVersion):
		return err
	case best < 0 && blanks(cs) < len(cs):
		r.gen = max(r.gen, lostGeneration)
	}
	bad, same := survey(cs)
	if best >= 0 {
		newest := cs[best].rec
		rec.minor, rec.ext = max(Minor, newest.minor), newest.ext
		rec.missing = r.missing(newest) & bad
		bad &^= rec.missing
		if same && bad == 0 && newest.state.Equal(rec.state) {
			return nil
		}
	}
	rec.gen = r.gen + 1
	if bad != 0 {
		rec.gen++ // see Heal
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	return r.write(cs, best, &rec)
}

// content is what was found in a place.
type content struct {
	rec *record // nil if there is no valid record
	raw []byte  // the bytes of rec
	err error   // why there is none
}

// survey returns which copies are not valid, and whether all others are the same.
func survey(cs []content) (bad uint8, same bool) {
	var raw []byte
	same = true
	for i := range cs {
		switch {
		case cs[i].rec == nil:
			bad |= 1 << i
		case raw == nil:
			raw = cs[i].raw
		case !bytes.Equal(cs[i].raw, raw):
			same = false
		}
	}
	return bad, same
}

// missing returns the copies that rec knows to be missing.
func (r *Record) missing(rec *record) uint8 {
	return rec.missing & (1<<len(r.places) - 1)
}

// read reads copy i.
func (r *Record) read(i int) content {
	var c content
	b, err := r.readBytes(i)
	if err == nil {
		c.rec, c.raw, err = decode(b)
	}
	if err != nil {
		c.err = fmt.Errorf("bootrecord: copy %d: %w", i, err)
	}
	return c
}

func (r *Record) readBytes(i int) (b []byte, err error) {
	for range readTries {
		if b, err = r.places[i].read(); err == nil {
			break
		}
	}
	return b, err
}

// scan reads all copies and returns them with the index of the newest. It is -1
// with an error if there is none; no copies are returned if ctx is done.
func (r *Record) scan(ctx context.Context) ([]content, int, error) {
	cs := make([]content, len(r.places))
	for i := range cs {
		if err := ctx.Err(); err != nil {
			return nil, -1, err
		}
		cs[i] = r.read(i)
	}
	best, err := newest(cs)
	if best >= 0 {
		r.gen = max(r.gen, cs[best].rec.gen)
	}
	r.report(cs)
	return cs, best, err
}

// newest returns the index of the newest valid copy. The protocol never writes
// two records of the same generation; should there be any, the one with more
// copies wins, then the first, and the others are marked as damaged.
func newest(cs []content) (int, error) {
	best, votes := -1, 0
	for i := range cs {
		if errors.Is(cs[i].err, ErrVersion) {
			return -1, cs[i].err
		}
		if cs[i].rec == nil {
			continue
		}
		n := 0
		for j := range cs {
			if bytes.Equal(cs[i].raw, cs[j].raw) {
				n++
			}
		}
		if best < 0 || cs[i].rec.gen > cs[best].rec.gen || cs[i].rec.gen == cs[best].rec.gen && n > votes {
			best, votes = i, n
		}
	}
	if best >= 0 {
		for i := range cs {
			if cs[i].rec != nil && cs[i].rec.gen == cs[best].rec.gen && !bytes.Equal(cs[i].raw, cs[best].raw) {
				cs[i] = content{err: fmt.Errorf("bootrecord: copy %d: differs from copy %d of the same generation: %w", i, best, ota.ErrBadBootState)}
			}
		}
		return best, nil
	}
	var read, bad error
	for i := range cs {
		switch err := cs[i].err; {
		case errors.Is(err, errBlank):
		case errors.Is(err, ota.ErrBadBootState):
			bad = errors.Join(bad, err)
		default:
			read = errors.Join(read, err)
		}
	}
	switch {
	case read != nil:
		return -1, read
	case bad != nil && blanks(cs) < len(cs)-1:
		return -1, bad
	}
	// One damaged copy beside blank ones is the first store of all, cut off: after
	// that, at least one copy is neither blank nor torn at any time.
	return -1, fmt.Errorf("bootrecord: %d of %d copies are blank: %w", blanks(cs), len(cs), ota.ErrNoBootState)
}

// blanks counts the blank copies.
func blanks(cs []content) (n int) {
	for i := range cs {
		if errors.Is(cs[i].err, errBlank) {
			n++
		}
	}
	return n
}

// write stores rec in all copies but those it calls missing. The copies cs were
// just read; best is the newest of them, or -1.
func (r *Record) write(cs []content, best int, rec *record) error {
	for again := false; ; again = true {
		raw, err := rec.encode()
		if err != nil {
			return fmt.Errorf("bootrecord: %w", err)
		}
		r.gen = max(r.gen, rec.gen)
		failed := r.writeAll(cs, best, content{rec: rec, raw: raw})
		if good := len(cs) - bits.OnesCount8(failed); good < 2 {
			r.report(cs)
			err := fmt.Errorf("bootrecord: only %d of %d copies written", good, len(cs))
			for i := range cs {
				err = errors.Join(err, cs[i].err)
			}
			return err
		}
		if failed == rec.missing || again {
			r.report(cs)
			return nil
		}
		// Write down which copies failed: a generation that they cannot hold.
		next := *rec
		next.gen++
		next.missing = failed
		rec = &next
	}
}

// writeAll replaces the copies by c, except for those missing, and returns which
// do not hold it in the end.
func (r *Record) writeAll(cs []content, best int, c content) (failed uint8) {
	todo := uint8(1<<len(cs)-1) &^ c.rec.missing
	failed = c.rec.missing
	for fresh := false; todo != 0; {
		i := next(cs, todo, best)
		todo &^= 1 << i
		var err error
		switch {
		case errors.Is(cs[i].err, ErrVersion):
			err = cs[i].err
		case !fresh && cs[i].rec != nil && lastValid(cs, i):
			err = fmt.Errorf("bootrecord: copy %d: not overwritten, as it is the last good one", i)
			cs[i].err = err
		default:
			if err = r.replace(i, c.raw); err != nil {
				cs[i] = content{err: err}
			} else {
				cs[i] = c
				fresh = true
			}
		}
		if err != nil {
			failed |= 1 << i
		}
		// A copy that reads well only sometimes must go before a good one.
		for j := range cs {
			if todo&(1<<j) != 0 && cs[j].rec != nil {
				cs[j] = r.read(j)
			}
		}
	}
	return failed
}

// next returns which of the copies todo is to be overwritten next: what is
// damaged first, then the oldest, the newest last. So what is valid is only
// given up once something better is elsewhere.
func next(cs []content, todo uint8, best int) int {
	k := -1
	for i := range cs {
		switch {
		case todo&(1<<i) == 0:
		case cs[i].rec == nil:
			return i
		case k < 0, k == best, i != best && cs[i].rec.gen < cs[k].rec.gen:
			k = i
		}
	}
	return k
}

// lastValid reports whether no copy other than i is valid.
func lastValid(cs []content, i int) bool {
	for j := range cs {
		if j != i && cs[j].rec != nil {
			return false
		}
	}
	return true
}

// replace writes raw to copy i and reads it back.
func (r *Record) replace(i int, raw []byte) error {
	err := r.places[i].write(raw)
	if err == nil {
		var b []byte
		if b, err = r.readBytes(i); err == nil && !bytes.HasPrefix(b, raw) {
			err = ota.ErrVerify
		}
	}
	if err != nil {
		return fmt.Errorf("bootrecord: copy %d: %w", i, err)
	}
	return nil
}

// report keeps what Health returns.
func (r *Record) report(cs []content) {
	h := Health{Errs: make([]error, len(cs))}
	gen := uint64(0)
	for i := range cs {
		if cs[i].rec != nil {
			gen = max(gen, cs[i].rec.gen)
		}
	}
	for i := range cs {
		switch {
		case cs[i].err != nil:
			h.Errs[i] = cs[i].err
		case cs[i].rec.gen < gen:
			h.Errs[i] = fmt.Errorf("bootrecord: copy %d: generation %d is older than %d", i, cs[i].rec.gen, gen)
		default:
			h.Good++
		}
	}
	r.mu.Lock()
	r.health = h
	r.mu.Unlock()
}

var (
	_ ota.Bootloader = (*Record)(nil)
	_ ota.Healer     = (*Record)(nil)
)
