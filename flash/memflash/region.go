package memflash

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"slices"
	"sort"
)

// pageSize is the unit of copy-on-write.
const pageSize = 4096

// page holds the bytes of a stretch of flash, and what is known about them. A
// page is written in place only by the region whose token it carries; token never
// changes, so that regions which share a page need no lock for it.
type page struct {
	data    [pageSize]byte
	written bitmap          // must be erased before they are written
	weak    *[pageSize]byte // mask of weak bits per byte, nil if there are none
	token   *token
}

type token struct{ _ byte } // not empty: every new one has an address of its own

// region is the medium of one flash. The chip's lock guards it.
type region struct {
	size, writeSize int64
	unitSize        int64   // erase unit, the largest; 0 if there are none
	starts          []int64 // of erase units of several sizes, else nil
	erased          byte
	rewrite         bool
	eraseLimit      int

	token *token
	pages []*page
	blank *page  // shared by all pages never written
	slab  []page // to make pages from; grows, so that a clone costs little
	slabs int
	wear  []int // per erase unit

	// With a volatile cache, pages is what is read, durable what is on the
	// medium, and log how to get from there to here, except for what a failed
	// sync has dropped. Without one, durable is nil.
	durable []*page
	log     []change
}

// change is a write, or an erase if data is nil.
type change struct {
	off, n int64
	data   []byte
}

func newRegion(cfg Config) (region, error) {
	r := region{size: cfg.Size, writeSize: max(1, cfg.WriteSize), unitSize: cfg.EraseSize,
		rewrite: cfg.Rewrite, eraseLimit: cfg.EraseLimit}
	fail := func(format string, args ...any) (region, error) {
		return region{writeSize: 1}, fmt.Errorf(format, args...)
	}
	switch {
	case cfg.Size < 0 || cfg.Size > MaxSize:
		return fail("size %d: need 0 to %d", cfg.Size, int64(MaxSize))
	case cfg.EraseSize < 0:
		return fail("erase size %d", cfg.EraseSize)
	case cfg.WriteSize < 0:
		return fail("write size %d", cfg.WriteSize)
	case cfg.EraseLimit < 0:
		return fail("erase limit %d", cfg.EraseLimit)
	case cfg.EraseSize > 0 && cfg.EraseUnits != nil:
		return fail("erase units of one size and of several")
	}
	units := 0
	if cfg.EraseUnits != nil {
		var sum int64
		for i, n := range cfg.EraseUnits {
			if n <= 0 || n > MaxSize-sum || n%r.writeSize != 0 {
				return fail("erase unit %d has %d bytes", i, n)
			}
			r.starts = append(r.starts, sum)
			r.unitSize = max(r.unitSize, n)
			sum += n
		}
		if r.size == 0 {
			r.size = sum
		}
		if r.size != sum || sum == 0 {
			return fail("erase units have %d bytes, the flash has %d", sum, r.size)
		}
		units = len(r.starts)
	} else if r.unitSize > 0 {
		if n := (r.size + r.unitSize - 1) / r.unitSize; n <= MaxSize/pageSize {
			units = int(n)
		} else {
			return fail("%d erase units", n)
		}
	}
	if r.size%r.writeSize != 0 || r.unitSize%r.writeSize != 0 {
		return fail("write size %d does not divide size and erase size", r.writeSize)
	}

	r.blank = &page{}
	if r.unitSize > 0 && !cfg.ErasedZero {
		r.erased = 0xff
		for i := range r.blank.data {
			r.blank.data[i] = 0xff
		}
	}
	r.token = &token{}
	r.pages = slices.Repeat([]*page{r.blank}, int((r.size+pageSize-1)/pageSize))
	if units > 0 {
		r.wear = make([]int, units)
	}
	if cfg.Unsynced {
		r.durable = slices.Clone(r.pages)
	}
	return r, nil
}

func (r *region) clone() region {
	c := *r
	// Neither side owns the common pages any more.
	r.token, c.token = &token{}, &token{}
	r.slab, c.slab, r.slabs, c.slabs = nil, nil, 0, 0
	c.pages, c.durable, c.wear = slices.Clone(r.pages), slices.Clone(r.durable), slices.Clone(r.wear)
	c.log = slices.Clone(r.log)
	return c
}

func (r *region) equal(s *region) bool {
	return r.size == s.size && slices.EqualFunc(r.pages, s.pages, func(a, b *page) bool {
		return a == b || a.data == b.data
	})
}

// inside reports whether [off, off+n) is a range of r.
func (r *region) inside(off, n int64) bool {
	return off >= 0 && n >= 0 && off <= r.size && n <= r.size-off
}

// unit returns index, start and length of the erase unit that holds off.
func (r *region) unit(off int64) (k int, start, n int64) {
	if r.starts == nil {
		k = int(off / r.unitSize)
		start = off - off%r.unitSize
		return k, start, min(r.unitSize, r.size-start)
	}
	k = sort.Search(len(r.starts), func(i int) bool { return r.starts[i] > off }) - 1
	k = max(0, k)
	end := r.size
	if k+1 < len(r.starts) {
		end = r.starts[k+1]
	}
	return k, r.starts[k], end - r.starts[k]
}

// writable returns page k, made writable. If all of it is about to be replaced,
// its content is not copied.
func (r *region) writable(k int, all bool) *page {
	p := r.pages[k]
	if r.owns(k) {
		return p
	}
	if len(r.slab) == 0 {
		r.slabs = min(2*r.slabs+1, 63)
		r.slab = make([]page, min(r.slabs, len(r.pages)))
	}
	q := &r.slab[0]
	r.slab = r.slab[1:]
	if !all {
		q.data, q.written = p.data, p.written
		if p.weak != nil {
			w := *p.weak
			q.weak = &w
		}
	}
	q.token = r.token
	r.pages[k] = q
	return q
}

func (r *region) owns(k int) bool {
	return r.pages[k].token == r.token && (r.durable == nil || r.durable[k] != r.pages[k])
}

// each calls fn for the pages of [off, off+n): page k from byte i on, m bytes, at
// distance d from off.
func each(off, n int64, fn func(k, i, m int, d int64)) {
	for d := int64(0); d < n; {
		i := int((off + d) % pageSize)
		m := int(min(n-d, int64(pageSize-i)))
		fn(int((off+d)/pageSize), i, m, d)
		d += int64(m)
	}
}

// read fills p from off on. Weak bits read as rng says, if it is not nil.
func (r *region) read(p []byte, off int64, rng *rand.Rand) {
	each(off, int64(len(p)), func(k, i, m int, d int64) {
		pg := r.pages[k]
		dst := p[d : d+int64(m)]
		copy(dst, pg.data[i:])
		if pg.weak == nil || rng == nil {
			return
		}
		for j := range dst {
			if w := pg.weak[i+j]; w != 0 {
				dst[j] ^= w & byte(rng.Uint32())
			}
		}
	})
}

// programmable reports whether p may be written at off: never between two
// erasures if it was before, or, with rewrite, only if no bit goes back. What
// counts is what the writer did: where an erase silently failed, or a bit has
// flipped, the medium does not know better than to mix.
func (r *region) programmable(p []byte, off int64) bool {
	ok := true
	if r.unitSize == 0 {
		return ok
	}
	each(off, int64(len(p)), func(k, i, m int, d int64) {
		pg := r.pages[k]
		if !ok || !pg.written.any(i, i+m) {
			return
		}
		if !r.rewrite {
			ok = false
			return
		}
		for j := range m {
			old, b := pg.data[i+j], p[d+int64(j)]
			if pg.written.any(i+j, i+j+1) && r.mix(old, b) != b {
				ok = false
			}
		}
	})
	return ok
}

// mix returns what a byte holds after b was programmed over old.
func (r *region) mix(old, b byte) byte {
	switch {
	case r.unitSize == 0:
		return b
	case r.erased == 0:
		return old | b
	}
	return old & b
}

// program writes p at off, as far as the medium can.
func (r *region) program(p []byte, off int64) {
	each(off, int64(len(p)), func(k, i, m int, d int64) {
		fresh := m == pageSize && (r.unitSize == 0 || r.pages[k] == r.blank)
		pg := r.writable(k, fresh)
		src, dst := p[d:d+int64(m)], pg.data[i:i+m]
		if r.unitSize > 0 {
			pg.written.set(i, i+m, true)
		}
		if fresh || r.unitSize == 0 || bytes.Equal(dst, r.blank.data[i:i+m]) {
			copy(dst, src)
		} else {
			for j := range dst {
				dst[j] = r.mix(dst[j], src[j])
			}
		}
		pg.heal(i, i+m)
	})
}

// store sets bytes and their weak bits (nil: none) regardless of all rules. They
// count as written.
func (r *region) store(p, weak []byte, off int64) {
	each(off, int64(len(p)), func(k, i, m int, d int64) {
		pg := r.writable(k, m == pageSize)
		if r.unitSize > 0 {
			pg.written.set(i, i+m, true)
		}
		copy(pg.data[i:i+m], p[d:])
		pg.heal(i, i+m)
		if weak == nil {
			return
		}
		for j, w := range weak[d : d+int64(m)] {
			pg.weaken(i+j, w)
		}
	})
}

// alter flips and weakens bits of one byte, on the medium and in the cache.
func (r *region) alter(off int64, flip, weak byte) {
	k, i := int(off/pageSize), int(off%pageSize)
	r.both(k, func() {
		pg := r.writable(k, false)
		pg.data[i] ^= flip
		pg.weaken(i, weak)
	})
}

// both has fn, which changes page k, change it on the medium, too.
func (r *region) both(k int, fn func()) {
	same := r.durable != nil && r.durable[k] == r.pages[k]
	fn()
	switch {
	case same:
		r.durable[k] = r.pages[k]
	case r.durable != nil:
		r.pages, r.durable = r.durable, r.pages
		fn()
		r.pages, r.durable = r.durable, r.pages
	}
}

// blankBytes returns n erased bytes, to be read only.
func (r *region) blankBytes(n int64) []byte { return bytes.Repeat([]byte{r.erased}, int(n)) }

// readWeak fills p with the masks of weak bits from off on.
func (r *region) readWeak(p []byte, off int64) {
	each(off, int64(len(p)), func(k, i, m int, d int64) {
		if w := r.pages[k].weak; w != nil {
			copy(p[d:], w[i:i+m])
		}
	})
}

// erase sets a range to the erased value.
func (r *region) erase(off, n int64) {
	each(off, n, func(k, i, m int, _ int64) {
		if m == pageSize && !r.owns(k) {
			r.pages[k] = r.blank
			return
		}
		pg := r.writable(k, false)
		copy(pg.data[i:i+m], r.blank.data[:])
		pg.written.set(i, i+m, false)
		pg.heal(i, i+m)
	})
}

// believe sets what a range counts as, written or erased, whatever it holds.
func (r *region) believe(off, n int64, written bool) {
	if r.unitSize == 0 {
		return
	}
	each(off, n, func(k, i, m int, _ int64) {
		r.writable(k, false).written.set(i, i+m, written)
	})
}

func (r *region) logWrite(p []byte, off int64) {
	if r.durable != nil {
		r.log = append(r.log, change{off, int64(len(p)), bytes.Clone(p)})
	}
}

func (r *region) logErase(off, n int64) {
	if r.durable != nil {
		r.log = append(r.log, change{off: off, n: n})
	}
}

// flush makes everything in the log durable.
func (r *region) flush() {
	for _, c := range r.log {
		each(c.off, c.n, func(k, _, _ int, _ int64) { r.durable[k] = r.pages[k] })
	}
	r.log = nil
}

// replay applies a random part of the log.
func (r *region) replay(rng *rand.Rand) {
	chunk := max(512, r.writeSize)
	for _, c := range r.log {
		share := rng.IntN(3) // none, all, part
		switch {
		case share == 0:
		case c.data == nil:
			r.erase(c.off, c.n)
		case share == 1:
			r.program(c.data, c.off)
		default:
			for d := int64(0); d < c.n; d += chunk {
				if rng.IntN(2) == 0 {
					r.program(c.data[d:min(c.n, d+chunk)], c.off+d)
				}
			}
		}
	}
}

// lose is a power cut: it decides what becomes of the log, and leaves in the
// cache only what is on the medium.
func (r *region) lose(loss Loss, rng *rand.Rand) {
	if r.durable == nil {
		return
	}
	if loss == LoseNone {
		r.flush()
	}
	copy(r.pages, r.durable)
	if loss == LoseSome {
		r.replay(rng)
		copy(r.durable, r.pages)
	}
	r.log = nil
}

// heal ends the weakness of bytes that were written or erased in full.
func (p *page) heal(from, to int) {
	if p.weak == nil {
		return
	}
	clear(p.weak[from:to])
	if *p.weak == ([pageSize]byte{}) {
		p.weak = nil
	}
}

func (p *page) weaken(i int, mask byte) {
	if mask == 0 {
		return
	}
	if p.weak == nil {
		p.weak = new([pageSize]byte)
	}
	p.weak[i] |= mask
}

// bitmap has one bit for each byte of a page.
type bitmap [pageSize / 64]uint64

// ends returns the masks of the first and last word that hold [from, to), which
// is not empty.
func ends(from, to int) (head, tail uint64) {
	return ^uint64(0) << (from % 64), ^uint64(0) >> (63 - (to-1)%64)
}

// any reports whether one of the bits [from, to) is set.
func (w *bitmap) any(from, to int) bool {
	head, tail := ends(from, to)
	words := w[from/64 : (to-1)/64+1]
	last := len(words) - 1
	if last == 0 {
		return words[0]&head&tail != 0
	}
	sum := words[0]&head | words[last]&tail
	for _, x := range words[1:last] {
		sum |= x
	}
	return sum != 0
}

// set sets the bits [from, to) to on.
func (w *bitmap) set(from, to int, on bool) {
	head, tail := ends(from, to)
	words := w[from/64 : (to-1)/64+1]
	for i := range words {
		mask := ^uint64(0)
		if i == 0 {
			mask &= head
		}
		if i == len(words)-1 {
			mask &= tail
		}
		if on {
			words[i] |= mask
		} else {
			words[i] &^= mask
		}
	}
}
