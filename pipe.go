package ota

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"hash"
	"io"
	"sync"
)

// How a part gets into a slot. Four stages work side by side on blocks from a
// fixed pool, each in a goroutine of its own that has ended when install returns:
//
//  1. The reader (the caller's goroutine) fills a block from the image's data or
//     from another slot, and compares it with what the target holds, unit by unit.
//     It is the only one to read flash, in ascending order.
//  2. The checker hashes: chunk by chunk if the image has digests of chunks, else
//     the part as a whole. A block goes on when all chunks in it have matched.
//  3. The writer erases and writes the units that differ, each of them once. It is
//     the only one to change the flash, in ascending order, so that a power cut
//     leaves what a sequence of single operations would.
//  4. The verifier reads back behind the writer, where the medium has a
//     [DirectReader]. Such a read is answered by the medium, and Sync only makes
//     durable what was read; so it may come before Sync. Without one a read might
//     be answered from memory: there, everything is read back after Sync.
//
// A part counts as written when Sync has returned nil and every byte of it, those
// found in place too, was read back and matched.

// pipe installs one part.
type pipe struct {
	*layout
	in   *installer
	ctx  context.Context
	job  *job
	pl   *plan       // nil: everything comes from the data
	from io.ReaderAt // the medium, if there is a direct way
	sum  hash.Hash   // of the whole part, if it has no chunks

	free, loaded, checked chan *block
	settled               chan int64 // how far the writer is, for the verifier

	once sync.Once
	err  error // the first failure

	// Of the reader:
	rewrite        bool   // keep nothing, see pass
	pause, backoff int    // blocks not to compare, from now on and next time
	held           *block // waits for the first unit that differs
	lo, hi         int64  // what is written whatever it holds
}

// fail notes the first failure. The other stages come to their end: at once if it
// is the flash or the data that are bad; what came before a source dried up is
// still good, and is written.
func (p *pipe) fail(err error, atOnce bool) {
	p.once.Do(func() {
		p.err = err
		if atOnce {
			p.job.stop()
		}
	})
}

func (p *pipe) run() (written, error) {
	blocks := p.in.pool(p.blocks(), p.block)
	p.free = make(chan *block, len(blocks))
	p.loaded, p.checked = make(chan *block, len(blocks)), make(chan *block, len(blocks))
	for _, b := range blocks {
		p.free <- b
	}
	var stages sync.WaitGroup
	var back written
	if p.from != nil {
		p.settled = make(chan int64, len(blocks))
		stages.Go(func() { back.direct = p.verify() })
	}
	stages.Go(p.check)
	stages.Go(p.write)
	if err := p.read(); err != nil {
		p.fail(err, false)
	}
	close(p.loaded)
	stages.Wait()
	if p.err != nil {
		return written{}, p.err
	}
	if err := p.f.Sync(); err != nil {
		p.in.failed = true
		return written{}, err
	}
	back.Size = p.size
	if p.job.want.Chunks != nil {
		back.SHA256 = *p.job.want.SHA256 // the chunks are part of the same description
	} else {
		p.sum.Sum(back.SHA256[:0])
	}
	return back, nil
}

// blocks returns how many blocks it takes to keep all stages busy, and one chunk
// waiting to be complete: fewer for small parts.
func (p *pipe) blocks() int {
	chunk := int64(0)
	if c := p.job.want.Chunks; c != nil {
		chunk = c.Size
	}
	n := (chunk + p.block - 1) / p.block
	most := (p.size+p.block-1)/p.block + 3
	if _, ok := p.f.(UnitEraser); ok {
		// Of units of several sizes, two blocks hold more than the size of one.
		n, most = 2*n, 2*most
	}
	return int(min(spareBlocks+n, most))
}

// read is the first stage.
func (p *pipe) read() error {
	for off := p.next(0); off < p.size; {
		var b *block
		select {
		case b = <-p.free:
		case <-p.ctx.Done():
			return p.ctx.Err()
		}
		if err := p.ctx.Err(); err != nil {
			return err
		}
		if err := p.lay(b, off); err != nil {
			return err
		}
		if err := p.load(b); err != nil {
			return err
		}
		p.compare(b)
		p.pass(b)
		off = p.next(b.end)
	}
	p.flush()
	// The read after the last byte reports what the format checks by itself.
	var one [1]byte
	switch n, err := io.ReadFull(p.job.data, one[:]); {
	case n != 0:
		return fmt.Errorf("more than the declared %d bytes: %w", p.size, ErrTooLarge)
	case err != io.EOF:
		return err
	}
	return p.ctx.Err()
}

// next returns the first unit from off on, which is the beginning of one, that has
// to be loaded.
func (p *pipe) next(off int64) int64 {
	if p.pl == nil {
		return off
	}
	if off = p.pl.next(off); off >= p.size {
		return p.size
	}
	return p.start(off)
}

// lay gives b the units from off on, as many as fit and have to be loaded.
func (p *pipe) lay(b *block, off int64) error {
	b.off, b.units = off, b.units[:0]
	for off < p.size {
		n, err := p.unit(off)
		if err != nil {
			return err
		}
		if off+n-b.off > p.block {
			break
		}
		b.units = append(b.units, unit{off: off, n: n})
		u := &b.units[len(b.units)-1]
		u.keep = !p.loads(u)
		if off += n; p.next(off) != off {
			break
		}
	}
	b.end = min(off, p.size)
	// Erase units are compared with their padding.
	pad := b.buf[b.end-b.off : off-b.off]
	for i := range pad {
		pad[i] = p.fill
	}
	return nil
}

// loads reports whether u is loaded whole, so that it can be written.
func (p *pipe) loads(u *unit) bool {
	return p.pl == nil || p.rewrite || p.pl.dirty(u.off, u.off+u.n)
}

// medium returns what the target is read through.
func (p *pipe) medium() io.ReaderAt {
	if p.from != nil {
		return p.from
	}
	return p.f
}

// load fills b.
func (p *pipe) load(b *block) error {
	if p.pl == nil {
		return p.take(b, b.off, b.end)
	}
	for pos := b.off; pos < b.end; {
		from, end := p.pl.piece(pos, b.end)
		var err error
		switch from {
		case inPlace: // not loaded, and not written
		case fromData:
			err = p.take(b, pos, end)
		case fromTarget:
			err = p.copyFrom(b, NoSlot, p.medium(), pos, pos, end)
		default:
			s, at := p.pl.other(pos, from)
			if err = p.copyFrom(b, s.id, s.f, at, pos, end); err == nil {
				p.in.counts.copied.Add(end - pos)
			}
		}
		if err != nil {
			return err
		}
		pos = end
	}
	return nil
}

// take reads the bytes from off to end of the part from the data.
func (p *pipe) take(b *block, off, end int64) error {
	n, err := io.ReadFull(p.job.data, b.bytes(off, end-off))
	p.in.counts.read.Add(int64(n))
	if err != nil && (errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF)) {
		err = fmt.Errorf("%d of %d bytes: %w: %w", off+int64(n), p.size, ErrTooSmall, io.ErrUnexpectedEOF)
	}
	return err
}

// copyFrom reads the bytes from off to end of the part from f, where they are at. An
// error names slot id, NoSlot for the target.
func (p *pipe) copyFrom(b *block, id SlotID, f io.ReaderAt, at, off, end int64) error {
	if err := readFull(f, b.bytes(off, end-off), at); err != nil {
		return &Error{Op: "read", Slot: id, Off: at, Err: err}
	}
	return nil
}

// compare marks the units of b that the flash holds already. Where nothing has to
// be erased it is not worth much reading: after a block that differs altogether
// more and more blocks go by, up to maxBackoff, and a plan has said already what
// differs.
func (p *pipe) compare(b *block) {
	if p.rewrite {
		return
	}
	if p.e == nil {
		if p.pl != nil {
			return
		}
		if p.pause > 0 {
			p.pause--
			return
		}
	}
	first, last := -1, 0
	for i := range b.units {
		if !b.units[i].keep {
			if first < 0 {
				first = i
			}
			last = i
		}
	}
	if first < 0 {
		return
	}
	off := b.units[first].off
	n := b.units[last].off + b.units[last].n - off
	grow(&p.in.old, p.block)
	old := p.in.old[:n]
	// What cannot be read is written anew.
	good, same := readFull(p.medium(), old, off) == nil, false
	for i := first; i <= last; i++ {
		if u := &b.units[i]; p.loads(u) {
			u.keep = good && bytes.Equal(b.bytes(u.off, u.n), old[u.off-off:][:u.n])
			same = same || u.keep
		}
	}
	if same {
		p.backoff = 0
	} else {
		p.backoff = min(max(1, 2*p.backoff), maxBackoff)
	}
	p.pause = p.backoff
}

// pass hands b to the checker. If the flash may hold what a power cut has left
// behind, some bits of the write that was cut short may be weak: they have been read
// as what they should be, and may be read otherwise tomorrow. On raw flash nothing
// tells which write that was, so nothing of it is kept or copied (rewrite). Where a
// controller hides weak bits a write can still be undone or torn: it ended before the
// first unit that differs, or at the end, or went over it, and everything that it can
// have reached is written again.
func (p *pipe) pass(b *block) {
	if p.job.suspect && !p.rewrite {
		i := 0
		for i < len(b.units) && b.units[i].keep {
			i++
		}
		if i == len(b.units) {
			if p.held != nil {
				p.send(p.held)
			}
			p.held = b
			return
		}
		p.found(b.units[i].off)
	}
	p.again(b)
	p.send(b)
}

// found has what lies around off written again, and ends the search for it.
func (p *pipe) found(off int64) {
	p.job.suspect = false
	p.lo, p.hi = off-p.block, off+p.block // no write is longer than a block
	if p.held != nil {
		p.again(p.held)
		p.send(p.held)
		p.held = nil
	}
}

// again has the units of b from p.lo to p.hi written again, if they are loaded.
func (p *pipe) again(b *block) {
	for i := range b.units {
		u := &b.units[i]
		if u.off+u.n > p.lo && u.off < p.hi && p.loads(u) {
			u.keep = false
		}
	}
}

// flush ends the search for what a power cut has left behind.
func (p *pipe) flush() {
	if p.held != nil {
		p.found(p.held.end)
	}
}

func (p *pipe) send(b *block) { p.loaded <- b } // which has room for all blocks

// check is the second stage. Nothing of a chunk goes on before the whole chunk has
// matched its digest.
func (p *pipe) check() {
	defer close(p.checked)
	chunks := p.job.want.Chunks
	if chunks == nil {
		for b := range p.loaded {
			p.sum.Write(b.bytes(b.off, b.end-b.off))
			p.checked <- b
		}
		return
	}
	h := sha256.New()
	var sum [32]byte
	var waiting []*block
	good := int64(0) // everything before it has matched, or is in place
	for b := range p.loaded {
		waiting = append(waiting, b)
		for pos := b.off; pos < b.end; {
			i := pos / chunks.Size
			end := min(chunks.end(i, p.size), b.end)
			if p.pl == nil || p.pl.from[i] != inPlace {
				if pos == i*chunks.Size {
					h.Reset()
				}
				h.Write(b.bytes(pos, end-pos))
				if end == chunks.end(i, p.size) {
					if h.Sum(sum[:0]); sum != chunks.SHA256[i] {
						p.fail(&Error{Slot: NoSlot, Off: i * chunks.Size, Err: p.mismatch(i)}, true)
						for range p.loaded { // until the reader has noticed
						}
						return
					}
					good = end
				}
			} else {
				good = end
			}
			pos = end
		}
		for len(waiting) > 0 && waiting[0].end <= good {
			p.checked <- waiting[0]
			waiting = waiting[1:]
		}
	}
}

// mismatch says what is wrong with chunk i.
func (p *pipe) mismatch(i int64) error {
	switch {
	case p.pl == nil || p.pl.from[i] == fromData:
		return fmt.Errorf("chunk %d: %w", i, ErrDigest)
	default:
		return fmt.Errorf("chunk %d, copied from a slot: %w: %w", i, ErrChanged, ErrDigest)
	}
}

// write is the third stage.
func (p *pipe) write() {
	if p.settled != nil {
		defer close(p.settled)
	}
	end, bad := int64(0), false // where the block before ended
	for b := range p.checked {
		if !bad {
			err := p.ctx.Err()
			if err == nil {
				err = p.put(b)
				p.in.failed = err != nil
			}
			if err != nil {
				p.fail(err, true)
				bad = true
			} else {
				p.settle(b, end)
				end = b.end
			}
		}
		p.free <- b
	}
	if !bad && end < p.size && p.ctx.Err() == nil && p.pl != nil && p.pl.next(end) >= p.size {
		p.settle(&block{off: p.size, end: p.size}, end)
	}
}

// settle notes that everything up to b.end is as it shall be; before says up to
// where that was so already.
func (p *pipe) settle(b *block, before int64) {
	n := int64(0)
	for _, u := range b.units {
		if !u.keep {
			n += min(u.off+u.n, p.size) - u.off
		}
	}
	p.in.counts.written.Add(n)
	p.in.counts.skipped.Add(b.end - before - n)
	if p.settled != nil {
		p.settled <- b.end
	}
	p.in.progress(PhaseWriting, b.end, p.size)
}

// put erases and writes the units of b that are not kept.
func (p *pipe) put(b *block) error {
	for us := b.units; len(us) > 0; {
		n := 0
		for n < len(us) && us[n].keep == us[0].keep {
			n++
		}
		if !us[0].keep {
			var err error
			if p.e != nil {
				err = p.putErased(b, us[:n])
			} else {
				err = p.putPlain(b, us[:n])
			}
			if err != nil {
				return err
			}
		}
		us = us[n:]
	}
	return nil
}

// putErased erases units that follow each other, together because many media are
// faster so, and writes them one by one.
func (p *pipe) putErased(b *block, us []unit) error {
	last := us[len(us)-1]
	if err := p.e.Erase(us[0].off, last.off+last.n-us[0].off); err != nil {
		return &Error{Op: "erase", Slot: NoSlot, Off: us[0].off, Err: err}
	}
	for _, u := range us {
		// What is erased already costs nothing.
		n := u.n
		for n >= p.page && all(b.bytes(u.off+n-p.page, p.page), p.fill) {
			n -= p.page
		}
		if n == 0 {
			continue
		}
		if err := writeFull(p.f, b.bytes(u.off, n), u.off); err != nil {
			return &Error{Op: "write", Slot: NoSlot, Off: u.off, Err: err}
		}
	}
	return nil
}

// putPlain writes units that follow each other. Zeros are left to the medium if it
// has a way of its own; it is read back like everything.
func (p *pipe) putPlain(b *block, us []unit) error {
	for len(us) > 0 {
		n, zero := 0, false
		if z, ok := p.f.(Zeroer); ok {
			isZero := func(u unit) bool { return all(b.bytes(u.off, u.n), 0) }
			zero = isZero(us[0])
			for n < len(us) && isZero(us[n]) == zero {
				n++
			}
			if zero {
				last := us[n-1]
				err := z.Zero(us[0].off, last.off+last.n-us[0].off)
				zero = !errors.Is(err, ErrUnsupported)
				if zero && err != nil {
					return &Error{Op: "write", Slot: NoSlot, Off: us[0].off, Err: err}
				}
			}
		} else {
			n = len(us)
		}
		if !zero {
			last := us[n-1]
			data := b.bytes(us[0].off, last.off+last.n-us[0].off)
			for int64(len(data))%p.page != 0 {
				data = append(data, p.fill)
			}
			if err := writeFull(p.f, data, us[0].off); err != nil {
				return &Error{Op: "write", Slot: NoSlot, Off: us[0].off, Err: err}
			}
		}
		us = us[n:]
	}
	return nil
}

// verify is the fourth stage: it hashes what the medium holds, some way behind the
// writer, and returns the digest of all.
func (p *pipe) verify() *[32]byte {
	grow(&p.in.bufs[0], p.block)
	h := sha256.New()
	pos := int64(0)
	for end := range p.settled {
		for pos < end && (end-pos >= p.block || end == p.size) && p.ctx.Err() == nil {
			b := p.in.bufs[0][:min(p.block, end-pos)]
			if err := readFull(p.from, b, pos); err != nil {
				p.fail(&Error{Op: "read", Slot: NoSlot, Off: pos, Err: err}, true)
				break
			}
			h.Write(b)
			pos += int64(len(b))
		}
	}
	if pos < p.size {
		return nil // it has failed
	}
	return (*[32]byte)(h.Sum(nil))
}

// layout divides the bytes of a part into units: an erase unit, or a run of write
// units. A unit is written whole or not at all.
type layout struct {
	f     Flash
	e     Eraser // nil if f needs no erasing
	fill  byte   // what the last unit is padded with
	page  int64  // write unit
	grain int64  // unit, if f needs no erasing
	block int64  // capacity of a block: one unit at least
	size  int64  // of the data
}

func newLayout(f Flash, size, block int64, chunks *Chunks) *layout {
	l := &layout{f: f, page: WriteSize(f), size: size}
	if l.e, _ = f.(Eraser); l.e != nil {
		l.fill = ErasedByte(f)
		// Whole units, or blocks would be fewer than chunks wait for.
		l.block = max(block/l.e.EraseSize(), 1) * l.e.EraseSize()
		return l
	}
	l.grain = grainSize
	if chunks != nil {
		for l.grain > pageSize && chunks.Size%l.grain != 0 {
			l.grain /= 2
		}
	}
	l.grain = max(min(l.grain, block)/l.page, 1) * l.page
	l.block = max(block/l.grain, 1) * l.grain
	return l
}

// start returns where the unit that holds off begins.
func (l *layout) start(off int64) int64 {
	if l.e == nil {
		return off - off%l.grain
	}
	s, _ := EraseUnit(l.f, off)
	return s
}

// unit returns the length of the unit that begins at off.
func (l *layout) unit(off int64) (int64, error) {
	if l.e == nil {
		return min(l.grain, l.size-off), nil
	}
	start, n := EraseUnit(l.f, off)
	if start != off || n <= 0 || n > l.block {
		return 0, &Error{Op: "erase", Slot: NoSlot, Off: off, Err: fmt.Errorf("erase unit of %d bytes at %d: %w", n, start, ErrInvalid)}
	}
	return n, nil
}

// block is a run of units on its way to the flash.
type block struct {
	buf      []byte
	off, end int64 // bytes of the part; end is not beyond the data
	units    []unit
}

// unit is a unit in a block.
type unit struct {
	off, n int64 // in the part; an erase unit may go beyond the data
	keep   bool  // it holds what it shall hold, or is not loaded
}

// bytes returns the n bytes of the part at off.
func (b *block) bytes(off, n int64) []byte { return b.buf[off-b.off : off-b.off+n] }
