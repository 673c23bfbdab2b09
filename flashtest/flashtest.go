// Package flashtest checks implementations of [ota.Flash], as testing/fstest
// does those of fs.FS. It does not need package testing: a device can check its
// own storage.
//
// Package crashtest does what this one cannot: it cuts the power.
package flashtest

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math"
	"sync"

	"github.com/slotota/ota"
)

// Violation is a rule that a Flash breaks. The rules are:
//
//	size              Size is positive and never changes
//	geometry          erase units tile the flash, none is larger than EraseSize, and
//	                  WriteSize divides all of them and Size
//	erase             Erase of whole units succeeds
//	erased            erased bytes read as ErasedByte
//	erase-bounds      Erase outside of the flash is refused and changes nothing
//	erase-align       so is Erase of parts of units
//	erase-neighbours  Erase leaves all other units alone
//	write             a write of whole write units succeeds, to media that must be
//	                  erased after erasing, to others at any time
//	write-count       WriteAt returns what was written; less is an error
//	write-buffer      WriteAt does not change its buffer, nor keep it
//	write-bounds      a write that is not all inside the flash is refused, changes
//	                  nothing and does not make the flash grow
//	write-align       so is a write of parts of write units
//	write-neighbours  a write leaves all other bytes alone
//	read              what was written reads back, at any offset and length
//	read-count        ReadAt returns what was read; less is an error
//	read-end          a read across the end returns what is inside with io.EOF, one
//	                  beyond it nothing, one before the start an error
//	sync              Sync succeeds, and keeps what was written
//	io-size           IOSize is not negative, and never changes
//	direct            an ota.DirectReader shows what was written as soon as that is
//	                  done, at any offset and length, to the end and not beyond
//	zero              ota.Zeroer, on media that need no erasing: what it was given is
//	                  zero, and all other bytes are left alone; if it cannot, nothing
//	                  has changed
//	zero-bounds       nor has it where not all is inside the flash, which is refused
//	concurrent        reads are independent of each other and of writes elsewhere
//	region            all that holds for an ota.Region of the flash
//	panic             no method panics
//
// Only the first breach of each rule is reported.
type Violation struct {
	Rule string
	Err  error
}

// Error returns rule and breach.
func (v *Violation) Error() string { return "flashtest: rule " + v.Rule + ": " + v.Err.Error() }

// Unwrap returns v.Err.
func (v *Violation) Unwrap() error { return v.Err }

// Test checks f and returns the rules that it breaks: [*Violation]s, joined. It
// destroys the content of f: all of its own choosing, and none of it is restored.
// f must have at least 3 erase units or, on media that need no erasing, 8 bytes
// and 3 write units; if it has not, the error wraps ota.ErrInvalid.
//
// Test writes to 5 erase units at most, and erases each about ten times. It needs
// memory for a few write units and 150 KiB, and four goroutines while it runs.
// Media that fail at times fail the test.
func Test(f ota.Flash) error {
	t := &test{f: f}
	for _, step := range []func(){t.geometry, t.basics, t.readEnd, t.writeBounds, t.writeAlign,
		t.eraseBounds, t.neighbours, t.direct, t.zero, t.concurrent, t.region} {
		t.guard(step)
		if t.stop {
			break
		}
	}
	t.guard(func() {
		if n := f.Size(); t.size > 0 && n != t.size {
			t.fail("size", "was %d, is %d now", t.size, n)
		}
	})
	return errors.Join(t.errs...)
}

type test struct {
	f      ota.Flash
	eraser ota.Eraser // nil if f needs no erasing
	size   int64
	ws     int64
	blocks []block // the first three adjoin each other; the last ends the flash
	errs   []error
	broken map[string]bool
	stop   bool // what was found makes the rest pointless
}

// block is an erase unit, or a stretch of a flash without any.
type block struct{ off, n int64 }

// What blocks hold.
const (
	erased = iota // nothing
	first         // patterns
	second
	third
	zeros
)

const (
	blockSize = 4 << 10  // on media without erase units
	chunkSize = 32 << 10 // largest read, and largest write but for the write unit
	maxUnits  = 1 << 24
)

func (t *test) fail(rule, format string, args ...any) {
	if t.broken[rule] {
		return
	}
	if t.broken == nil {
		t.broken = map[string]bool{}
	}
	t.broken[rule] = true
	t.errs = append(t.errs, &Violation{rule, fmt.Errorf(format, args...)})
}

// guard calls step and reports a panic.
func (t *test) guard(step func()) {
	defer func() {
		if p := recover(); p != nil {
			t.fail("panic", "%v", p)
			t.stop = true
		}
	}()
	step()
}

// geometry looks at what f says about itself, and chooses the blocks.
func (t *test) geometry() {
	t.stop = true
	if t.size = t.f.Size(); t.size <= 0 {
		t.fail("size", "%d bytes: %w", t.size, ota.ErrInvalid)
		return
	}
	t.ws = 1
	if w, ok := t.f.(ota.WriteSizer); ok {
		t.ws = w.WriteSize()
	}
	if t.ws < 1 || t.size%t.ws != 0 {
		t.fail("geometry", "write units of %d bytes in a flash of %d", t.ws, t.size)
		return
	}
	t.eraser, _ = t.f.(ota.Eraser)
	_, units := t.f.(ota.UnitEraser)
	switch {
	case t.eraser != nil:
		if !t.eraseUnits() {
			return
		}
	case units:
		t.fail("geometry", "has EraseUnit, but no Erase")
		return
	default:
		n := max(t.ws, min(blockSize, t.size/4)/t.ws*t.ws)
		if t.size < 8 || t.size/n < 3 {
			t.fail("geometry", "%d bytes in write units of %d are too few for this test: %w", t.size, t.ws, ota.ErrInvalid)
			return
		}
		t.blocks = []block{{0, n}, {n, n}, {2 * n, n}}
		if last := t.size - n; last >= 3*n {
			t.blocks = append(t.blocks, block{last / 2 / t.ws * t.ws, n})
			t.blocks = append(t.blocks, block{last, n})
			if m := t.blocks[3]; m.off < 3*n || m.off+n > last {
				t.blocks = append(t.blocks[:3], t.blocks[4])
			}
		} else {
			t.blocks[2].n = t.size - 2*n
		}
	}
	t.stop = false
}

// eraseUnits checks the erase units.
func (t *test) eraseUnits() bool {
	largest := t.eraser.EraseSize()
	if largest <= 0 {
		t.fail("geometry", "erase units of %d bytes", largest)
		return false
	}
	var all []block // a few
	seen := int64(0)
	count := 0
	for off := int64(0); off < t.size; count++ {
		start, n := ota.EraseUnit(t.f, off)
		switch {
		case n <= 0 || start != off || n > t.size-off:
			t.fail("geometry", "the erase unit at %d is %d bytes at %d, in a flash of %d", off, n, start, t.size)
			return false
		case n%t.ws != 0:
			t.fail("geometry", "the erase unit of %d bytes at %d does not consist of write units of %d", n, off, t.ws)
			return false
		case n > largest:
			t.fail("geometry", "the erase unit at %d has %d bytes, EraseSize says %d", off, n, largest)
			return false
		case count == maxUnits:
			t.fail("geometry", "more than %d erase units: %w", maxUnits, ota.ErrInvalid)
			return false
		}
		for _, at := range []int64{off + n/2, off + n - 1} {
			if s, m := ota.EraseUnit(t.f, at); s != off || m != n {
				t.fail("geometry", "the erase unit that holds %d is %d bytes at %d, and that at %d has %d bytes", at, m, s, off, n)
				return false
			}
		}
		seen = max(seen, n)
		b := block{off, n}
		switch {
		case len(all) < 3:
			all = append(all, b)
		case len(all) == 3:
			all = append(all, b, b) // one in the middle, the last
		default:
			all[4] = b
			if all[3].off < t.size/2 {
				all[3] = b
			}
		}
		off += n
	}
	if seen != largest && count > 1 {
		t.fail("geometry", "the largest erase unit has %d bytes, EraseSize says %d", seen, largest)
	}
	if len(all) < 3 {
		t.fail("geometry", "%d erase units are too few for this test: %w", len(all), ota.ErrInvalid)
		return false
	}
	if len(all) == 5 && all[3] == all[4] {
		all = all[:4]
	}
	t.blocks = all
	return true
}

func (t *test) last() block { return t.blocks[len(t.blocks)-1] }

// fill fills p with what a block with the given content has at off.
func (t *test) fill(p []byte, content int, off int64) {
	switch content {
	case erased:
		copy(p, bytes.Repeat([]byte{ota.ErasedByte(t.f)}, len(p)))
		return
	case zeros:
		clear(p)
		return
	}
	for i := range p {
		// The finalizer of SplitMix64, on offset and content.
		x := (uint64(off)+uint64(i))*0x9e3779b97f4a7c15 + uint64(content)*0xbf58476d1ce4e5b9
		x ^= x >> 29
		p[i] = byte(x * 0x94d049bb133111eb >> 56)
	}
}

// expect reads b, which is to hold content, in pieces, and blames rule if it
// does not.
func (t *test) expect(rule string, b block, content int, when string) {
	want, got := make([]byte, min(b.n, chunkSize)), make([]byte, min(b.n, chunkSize))
	for off := b.off; off < b.off+b.n; {
		n := min(b.off+b.n-off, chunkSize)
		if !t.read(got[:n], off) {
			return
		}
		t.fill(want[:n], content, off)
		if !bytes.Equal(got[:n], want[:n]) {
			i := int64(0)
			for got[i] == want[i] {
				i++
			}
			t.fail(rule, "%s: byte %d reads as %#02x instead of %#02x", when, off+i, got[i], want[i])
			return
		}
		off += n
	}
}

// read reads inside of the flash.
func (t *test) read(p []byte, off int64) bool {
	n, err := t.f.ReadAt(p, off)
	switch {
	case n == len(p) && (err == nil || err == io.EOF && off+int64(n) == t.size):
		return true
	case n == len(p):
		t.fail("read", "%d bytes at %d: all were read, and yet: %w", len(p), off, err)
	case n < 0 || n > len(p):
		t.fail("read-count", "%d bytes at %d: %d bytes were read (%v)", len(p), off, n, err)
	case err == nil:
		t.fail("read-count", "%d bytes at %d: %d bytes were read, without an error", len(p), off, n)
	default:
		t.fail("read", "%d bytes at %d: %w", len(p), off, err)
	}
	return false
}

// erase erases whole units.
func (t *test) erase(off, n int64) {
	if t.eraser == nil {
		return
	}
	if err := t.eraser.Erase(off, n); err != nil {
		t.fail("erase", "%d bytes at %d: %w", n, off, err)
	}
}

// write writes whole write units with content.
func (t *test) write(content int, off, n int64) {
	p := make([]byte, n)
	t.fill(p, content, off)
	want := bytes.Clone(p)
	k, err := t.f.WriteAt(p, off)
	switch {
	case err != nil:
		t.fail("write", "%d bytes at %d: %w", n, off, err)
	case k != len(p):
		t.fail("write-count", "%d bytes at %d: %d were written, without an error", n, off, k)
	}
	if !bytes.Equal(p, want) {
		t.fail("write-buffer", "the write of %d bytes at %d has changed the buffer", n, off)
	}
	invert(p) // to be seen if the buffer was kept
}

func invert(p []byte) {
	for i := range p {
		p[i] = ^p[i]
	}
}

// rewrite erases b and writes content in pieces of different lengths.
func (t *test) rewrite(b block, content int) {
	t.erase(b.off, b.n)
	pieces := []int64{t.ws, 2 * t.ws, max(t.ws, chunkSize/t.ws*t.ws)}
	for i, off := 0, b.off; off < b.off+b.n; i++ {
		n := min(pieces[min(i, 2)], b.off+b.n-off)
		t.write(content, off, n)
		off += n
	}
}

func (t *test) sync() {
	if err := t.f.Sync(); err != nil {
		t.fail("sync", "%w", err)
	}
}

// basics erases, writes, syncs and reads.
func (t *test) basics() {
	for _, b := range t.blocks {
		if t.eraser != nil {
			t.erase(b.off, b.n)
			t.expect("erased", b, erased, "after erasing")
		}
		t.rewrite(b, first)
		t.expect("read", b, first, "after writing")
		if t.broken["read"] {
			t.blame(b)
		}
	}
	t.sync()
	for _, b := range t.blocks {
		t.expect("sync", b, first, "after Sync")
	}
	t.sync() // with nothing to do
	for _, b := range t.blocks {
		for _, piece := range []block{{1, 1}, {b.n / 2, b.n / 3}, {b.n - 1, 1}, {b.n / 3, 7}} {
			if piece.off+piece.n <= b.n {
				t.expect("read", block{b.off + piece.off, piece.n}, first, "read in part")
			}
		}
	}
	// The first two blocks at once.
	b := block{t.blocks[0].off, t.blocks[0].n + t.blocks[1].n}
	t.erase(b.off, b.n)
	if t.eraser != nil {
		t.expect("erased", b, erased, "after erasing two units at once")
	}
	t.rewrite(t.blocks[1], second)
	t.rewrite(t.blocks[0], second)
	t.expect("write", b, second, "after writing once more")
	t.rewrite(t.blocks[0], first)
	t.rewrite(t.blocks[1], first)
	rule := "write-neighbours"
	if t.eraser != nil {
		rule = "erase-neighbours"
	}
	for _, b := range t.blocks {
		t.expect(rule, b, first, "after erasing and writing other places")
	}
	t.stop = len(t.errs) > 0
}

// blame finds out whether b holds what the buffers held after they were written.
func (t *test) blame(b block) {
	want, got := make([]byte, t.ws), make([]byte, t.ws)
	t.fill(want, first, b.off)
	invert(want)
	if t.read(got, b.off) && bytes.Equal(got, want) {
		t.fail("write-buffer", "a write at %d has kept the buffer, which was changed later", b.off)
	}
}

// readEnd reads where there is nothing.
func (t *test) readEnd() {
	p := make([]byte, 8)
	tail := min(3, t.last().n) // known bytes at the end
	for _, tc := range []struct{ off, n int64 }{
		{t.size, 0}, {t.size + 1, 0}, {math.MaxInt64 - 4, 0}, {-1, 0}, {math.MinInt64, 0}, {t.size - tail, tail},
	} {
		n, err := t.f.ReadAt(p, tc.off)
		switch {
		case int64(n) != tc.n:
			t.fail("read-end", "%d bytes at %d, in a flash of %d: %d were read (%v), must be %d", len(p), tc.off, t.size, n, err, tc.n)
		case err == nil:
			t.fail("read-end", "%d bytes at %d, in a flash of %d: no error", len(p), tc.off, t.size)
		case tc.off >= 0 && !errors.Is(err, io.EOF):
			t.fail("read-end", "%d bytes at %d, in a flash of %d: must be io.EOF: %w", len(p), tc.off, t.size, err)
		case tc.off < 0 && errors.Is(err, io.EOF):
			t.fail("read-end", "%d bytes at %d: must not be io.EOF", len(p), tc.off)
		}
	}
	want := make([]byte, tail)
	if t.fill(want, first, t.size-tail); !bytes.Equal(p[:tail], want) {
		t.fail("read-end", "the last bytes read as %x instead of %x", p[:tail], want)
	}
}

// refused reports whether err is one.
func (t *test) refused(rule, what string, off, n int64, err error) {
	if err == nil {
		t.fail(rule, "%s of %d bytes at %d, in a flash of %d: not refused", what, n, off, t.size)
	}
}

// far is a distant offset on the grid of all units.
func (t *test) far() int64 { return math.MaxInt64 / 2 / t.size * t.size }

func (t *test) writeBounds() {
	b := t.last()
	content := first
	if t.eraser != nil {
		// Otherwise it might be refused for another reason.
		t.erase(b.off, b.n)
		content = erased
	}
	for _, w := range []block{{t.size, t.ws}, {t.size - t.ws, 2 * t.ws}, {t.far(), t.ws}, {-t.ws, t.ws}, {-t.ws, 2 * t.ws}} {
		p := make([]byte, w.n)
		t.fill(p, third, w.off)
		_, err := t.f.WriteAt(p, w.off)
		t.refused("write-bounds", "a write", w.off, w.n, err)
	}
	if n := t.f.Size(); n != t.size {
		t.fail("write-bounds", "the flash had %d bytes and has %d now", t.size, n)
		t.stop = true
		return
	}
	t.expect("write-bounds", b, content, "after a write beyond the end")
	t.expect("write-bounds", t.blocks[0], first, "after a write before the start")
	t.rewrite(b, first)
}

func (t *test) writeAlign() {
	if t.ws == 1 {
		return
	}
	b := t.blocks[1]
	content := first
	if t.eraser != nil {
		t.erase(b.off, b.n)
		content = erased
	}
	for _, w := range []block{{b.off, 1}, {b.off, t.ws - 1}, {b.off + 1, t.ws}, {b.off + t.ws - 1, 1}} {
		if w.off+w.n > t.size {
			continue
		}
		p := make([]byte, w.n)
		t.fill(p, third, w.off)
		_, err := t.f.WriteAt(p, w.off)
		t.refused("write-align", "a write", w.off, w.n, err)
	}
	t.expect("write-align", b, content, "after the write of a part of a write unit")
	t.rewrite(b, first)
}

func (t *test) eraseBounds() {
	if t.eraser == nil {
		return
	}
	b := t.last()
	unit := t.eraser.EraseSize()
	for _, e := range []block{{t.size, unit}, {b.off, b.n + unit}, {-unit, unit}, {-unit, unit + t.blocks[0].n}, {t.far(), unit}, {b.off, math.MaxInt64}, {0, -1}} {
		t.refused("erase-bounds", "an erase", e.off, e.n, t.eraser.Erase(e.off, e.n))
	}
	for _, b := range t.blocks {
		t.expect("erase-bounds", b, first, "after an erase beyond the flash")
	}
	b = t.blocks[1]
	for _, e := range []block{{b.off + t.ws, b.n - t.ws}, {b.off, b.n - t.ws}, {b.off - t.ws, b.n + t.ws}, {b.off + 1, b.n}} {
		// With one write unit to the erase unit some of these are whole units.
		if start, _ := ota.EraseUnit(t.f, e.off); e.n > 0 && start == e.off {
			if start, n := ota.EraseUnit(t.f, e.off+e.n-1); start+n == e.off+e.n {
				continue
			}
		}
		if e.n > 0 {
			t.refused("erase-align", "an erase", e.off, e.n, t.eraser.Erase(e.off, e.n))
		}
	}
	for _, b := range t.blocks[:3] {
		t.expect("erase-align", b, first, "after an erase of a part of a unit")
	}
}

// neighbours changes one block and looks at the others.
func (t *test) neighbours() {
	b := t.blocks[1]
	others := func(rule, when string) {
		for _, o := range t.blocks {
			if o != b {
				t.expect(rule, o, first, when)
			}
		}
	}
	if t.eraser != nil {
		t.erase(b.off, b.n)
		t.expect("erased", b, erased, "after erasing once more")
		others("erase-neighbours", "after erasing another unit")
	}
	// One write unit in the middle.
	at := b.off + b.n/2/t.ws*t.ws
	t.write(second, at, t.ws)
	t.sync()
	content := first
	if t.eraser != nil {
		content = erased
	}
	t.expect("write-neighbours", block{b.off, at - b.off}, content, "after a write behind it")
	t.expect("write", block{at, t.ws}, second, "after writing")
	t.expect("write-neighbours", block{at + t.ws, b.off + b.n - at - t.ws}, content, "after a write before it")
	others("write-neighbours", "after a write elsewhere")
	t.rewrite(b, first)
}

// concurrent reads and writes at the same time, never the same bytes.
func (t *test) concurrent() {
	const readers, rounds = 4, 25
	b := t.blocks[1]
	t.erase(b.off, b.n)
	var wg sync.WaitGroup
	var mu sync.Mutex
	complain := func(err error) {
		mu.Lock()
		defer mu.Unlock()
		t.fail("concurrent", "%w", err)
	}
	for r := range readers {
		wg.Go(func() {
			defer func() {
				if p := recover(); p != nil {
					complain(fmt.Errorf("panic: %v", p))
				}
			}()
			for i := range rounds {
				b := t.blocks[[]int{0, 2, len(t.blocks) - 1}[(r+i)%3]]
				n := min(b.n, 1000)
				off := b.off + (b.n-n)*int64(i)/rounds
				got, want := make([]byte, n), make([]byte, n)
				t.fill(want, first, off)
				if k, err := t.f.ReadAt(got, off); int64(k) != n {
					complain(fmt.Errorf("read of %d bytes at %d, beside others: %d bytes (%v)", n, off, k, err))
				} else if !bytes.Equal(got, want) {
					complain(fmt.Errorf("read of %d bytes at %d, beside others: wrong bytes", n, off))
				}
			}
		})
	}
	n := max(t.ws, b.n/4/t.ws*t.ws)
	for off := b.off; off < b.off+b.n; {
		n := min(n, b.off+b.n-off, max(t.ws, chunkSize/t.ws*t.ws))
		p := make([]byte, n)
		t.fill(p, first, off)
		if k, err := t.f.WriteAt(p, off); err != nil || int64(k) != n {
			complain(fmt.Errorf("write of %d bytes at %d, beside reads: %d bytes (%v)", n, off, k, err))
			break
		}
		off += n
	}
	wg.Wait()
	t.expect("concurrent", b, first, "after writing beside reads")
}

// direct reads past what may be a cache, while what was written is not synced.
func (t *test) direct() {
	if s, ok := t.f.(ota.IOSizer); ok {
		if n := s.IOSize(); n < 0 || n != s.IOSize() {
			t.fail("io-size", "%d bytes, then %d", n, s.IOSize())
		}
	}
	d := ota.Direct(t.f)
	if d == nil {
		return
	}
	b := t.last() // first is in it
	for _, content := range []int{second, first} {
		t.rewrite(b, content)
		for _, r := range []block{{0, min(b.n, chunkSize)}, {1, min(b.n, chunkSize) - 1}, {b.n / 2, 1}, {b.n / 3, b.n - b.n/3}, {max(0, b.n-3), 8}, {b.n, 1}} {
			r.n = min(r.n, chunkSize)
			inside := min(r.n, b.n-r.off)
			got, want := make([]byte, r.n), make([]byte, inside)
			t.fill(want, content, b.off+r.off)
			n, err := d.ReadAt(got, b.off+r.off)
			switch {
			case int64(n) != inside || !bytes.Equal(got[:inside], want):
				t.fail("direct", "%d bytes at %d: %d were read (%v), or others than were written", r.n, b.off+r.off, n, err)
			case inside < r.n && !errors.Is(err, io.EOF), err != nil && (!errors.Is(err, io.EOF) || r.off+r.n < b.n):
				t.fail("direct", "%d bytes at %d, in a flash of %d: %v", r.n, b.off+r.off, t.size, err)
			}
		}
	}
}

// zero has bytes made zero.
func (t *test) zero() {
	z, ok := t.f.(ota.Zeroer)
	if !ok || t.eraser != nil {
		return
	}
	b := t.blocks[1]
	for _, r := range []block{{0, b.n}, {0, 0}, {t.ws, t.ws}, {min(512, b.n), max(0, min(1024, b.n-512))}, {b.n - 1, 1}} {
		r.n = min(r.n, b.n-r.off)
		inside := zeros
		switch err := z.Zero(b.off+r.off, r.n); {
		case errors.Is(err, ota.ErrUnsupported):
			inside = first
		case err != nil:
			t.fail("zero", "%d bytes at %d: %w", r.n, b.off+r.off, err)
		}
		t.expect("zero", block{b.off, r.off}, first, "before what was made zero")
		t.expect("zero", block{b.off + r.off, r.n}, inside, "after it was to be made zero")
		t.expect("zero", block{b.off + r.off + r.n, b.n - r.off - r.n}, first, "behind what was made zero")
		t.rewrite(b, first)
	}
	for _, r := range []block{{t.size, t.ws}, {t.size - t.ws, 2 * t.ws}, {t.far(), t.ws}, {-t.ws, 2 * t.ws}, {t.ws, -t.ws}} {
		t.refused("zero-bounds", "making zero", r.off, r.n, z.Zero(r.off, r.n))
	}
	if n := t.f.Size(); n != t.size {
		t.fail("zero-bounds", "the flash had %d bytes and has %d now", t.size, n)
	}
	for _, b := range t.blocks {
		t.expect("zero-bounds", b, first, "after making zero what is outside")
	}
}

// region uses a part of the flash.
func (t *test) region() {
	b := t.blocks[1]
	r, err := ota.Region(t.f, b.off, b.n)
	if err != nil {
		t.fail("region", "%w", err)
		return
	}
	if n := r.Size(); n != b.n {
		t.fail("region", "%d bytes instead of %d", n, b.n)
	}
	if ws := ota.WriteSize(r); ws != t.ws {
		t.fail("region", "write units of %d bytes instead of %d", ws, t.ws)
	}
	e, ok := r.(ota.Eraser)
	if ok != (t.eraser != nil) {
		t.fail("region", "is an Eraser: %v", ok)
	}
	if ok {
		if start, n := ota.EraseUnit(r, b.n-1); start != 0 || n != b.n {
			t.fail("region", "the erase unit is %d bytes at %d", n, start)
		}
		if ota.ErasedByte(r) != ota.ErasedByte(t.f) {
			t.fail("region", "another value of erased bytes")
		}
		if err := e.Erase(0, b.n); err != nil {
			t.fail("region", "erase: %w", err)
		}
	}
	p, got := make([]byte, t.ws), make([]byte, t.ws)
	t.fill(p, second, b.off)
	if _, err := r.WriteAt(p, 0); err != nil {
		t.fail("region", "write: %w", err)
	}
	if err := r.Sync(); err != nil {
		t.fail("region", "sync: %w", err)
	}
	t.expect("region", block{b.off, t.ws}, second, "after a write to a region")
	if n, err := r.ReadAt(got, 0); int64(n) != t.ws || !bytes.Equal(got, p) {
		t.fail("region", "reads %x (%d bytes, %v) instead of %x", got, n, err, p)
	}
	_, err = r.WriteAt(p, b.n)
	t.refused("region", "a write beyond a region", b.n, t.ws, err)
	t.expect("region", t.blocks[0], first, "after a write to a region behind it")
	t.expect("region", t.blocks[2], first, "after a write to a region before it")
}
