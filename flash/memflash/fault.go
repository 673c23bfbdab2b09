package memflash

import (
	"bytes"
	"math/bits"
	"math/rand/v2"
	"time"
)

// Kind is what a [Fault] does.
type Kind uint8

// The kinds of faults. A cut ends the power: the operation returns
// [ErrPowerOff], and so does everything until [Chip.PowerOn]. On a read and on a
// sync, all cuts but CutAfter are the same.
const (
	// CutBefore cuts the power before the operation has any effect.
	CutBefore Kind = iota
	// CutPrefix cuts it when the first N bytes are done; N = 0 leaves the
	// number to Seed.
	CutPrefix
	// CutBits cuts it when some of the bits that change have changed: few,
	// half or most of them.
	CutBits
	// CutWeak cuts it at the very end: all is done, but N of the bits that
	// changed are weak and read as either value, anew at every read, until
	// they are written or erased again. N = 0 leaves the number to Seed: from
	// one, so that the data often reads well, to half of them.
	CutWeak
	// CutAfter cuts it after the operation, before it is reported.
	CutAfter
	// Skip does nothing and reports success. A skipped sync makes nothing
	// durable, a skipped read leaves in the buffer what was there.
	Skip
	// Fail reports ErrFault. A write still writes its first N bytes, and says
	// so; anything else does nothing. What a failed sync leaves behind follows
	// Loss: still in the cache, to be saved by the next sync (LoseNone), or
	// read from the cache but not saved by any later sync, as on Linux, except
	// for a part saved (LoseSome) or for nothing (LoseAll).
	Fail
	// Misdirect performs a read, write or erase at another place of the same
	// flash, at offset N if that is not 0, and reports success. On a sync it
	// has no effect.
	Misdirect
	// Flip inverts N bits (0: one) at random places, within the bytes of the
	// operation or, if Len is not 0, of Off and Len; then the operation goes on.
	Flip
	// Slow delays the operation by Delay, with time.Sleep.
	Slow
)

// Loss says what a power cut does to data that was not synced, in the flashes
// with Config.Unsynced.
type Loss uint8

// The losses. An operation that is cut belongs to the unsynced ones.
const (
	LoseNone Loss = iota // everything had reached the medium
	LoseSome             // each write and erase is kept, lost, or kept in part, in any order
	LoseAll              // nothing had reached the medium
)

// Fault is something that goes wrong. It strikes at the first operation that is
// not before At and matches On, Flash, Off and Len.
type Fault struct {
	Kind Kind
	// At is a number of an operation or, if On is OpRead, of a read.
	At int
	// On limits the fault to kinds of operations; 0 means all but reads.
	On OpKind
	// Flash, Off and Len limit the fault to operations that touch the Len
	// bytes at Off of one flash, unless Len is 0. They never match a sync.
	Flash    int
	Off, Len int64
	// Forever makes the fault strike at all later operations, too.
	Forever bool

	N     int64         // see Kind
	Seed  uint64        // decides whatever is left open
	Loss  Loss          // for cuts and failing syncs
	Delay time.Duration // for Slow
}

// TearModes returns one fault for each way in which a power cut can end an
// operation, with At 0 and the given seed: before, in the middle (prefix, random
// bits, weak bits), after; and the losses of unsynced data.
func TearModes(seed uint64) []Fault {
	return []Fault{
		{Kind: CutBefore, Seed: seed},
		{Kind: CutPrefix, Seed: seed},
		{Kind: CutBits, Seed: seed},
		{Kind: CutWeak, Seed: seed},
		{Kind: CutAfter, Seed: seed},
		{Kind: CutAfter, Loss: LoseAll, Seed: seed},
		{Kind: CutAfter, Loss: LoseSome, Seed: seed},
		{Kind: CutBits, Loss: LoseSome, Seed: seed},
	}
}

// Plan replaces the planned faults. If several strike at the same operation, all
// of kind Flip and Slow do, and of the others the first.
func (c *Chip) Plan(faults ...Fault) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.plan = c.plan[:0]
	for _, f := range faults {
		if f.On == 0 {
			f.On = opMutating
		}
		c.plan = append(c.plan, planned{Fault: f})
	}
}

// Pending returns how many of the planned faults have not struck yet.
func (c *Chip) Pending() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	n := 0
	for i := range c.plan {
		if !c.plan[i].struck {
			n++
		}
	}
	return n
}

// PowerOff cuts the power now. Operations under way fail.
func (c *Chip) PowerOff(loss Loss, seed uint64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.off {
		c.cut(loss, newRand(seed, 0))
	}
}

// PowerOn restores the power. Faults still planned stay so, and operations are
// numbered on.
func (c *Chip) PowerOn() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.off = false
}

func newRand(seed uint64, index int) *rand.Rand {
	return rand.New(rand.NewPCG(seed, uint64(index)))
}

// cut ends the power and decides about everything not synced.
func (c *Chip) cut(loss Loss, rng *rand.Rand) {
	c.off = true
	for _, f := range c.flashes {
		f.lose(loss, rng)
	}
	// What weak bits read as depends on the cut, too.
	c.weak = rand.New(rand.NewPCG(rng.Uint64(), rng.Uint64()))
}

// hit is a fault that decides about an operation.
type hit struct {
	Fault
	index int
}

// begin numbers an operation and returns the fault that decides about it, if
// any, with the chip locked. After an error it is not locked.
func (f *flash) begin(kind OpKind, off, n int64) (*hit, error) {
	c := f.c
	c.mu.Lock()
	if c.off {
		c.mu.Unlock()
		return nil, f.error(kind, off, n, ErrPowerOff)
	}
	op := Op{Kind: kind, Flash: f.i, Off: off, Len: n}
	switch kind {
	case OpRead:
		op.Index = c.stats.Reads
		c.stats.Reads++
		c.stats.BytesRead += n
	default:
		op.Index = c.stats.Ops
		c.stats.Ops++
		if kind == OpWrite {
			c.stats.BytesWritten += n
		} else {
			c.stats.BytesErased += n
		}
	}
	var h *hit
	var delay time.Duration
	for i := range c.plan {
		p := &c.plan[i]
		if !p.matches(op) {
			continue
		}
		switch p.Kind {
		case Slow:
			delay += p.Delay
		case Flip:
			f.flip(&p.Fault, op)
		default:
			if h != nil {
				continue
			}
			h = &hit{p.Fault, op.Index}
		}
		p.struck = true
	}
	if hook := c.hook; hook != nil || delay > 0 {
		c.mu.Unlock()
		if hook != nil {
			hook(op)
		}
		time.Sleep(delay)
		c.mu.Lock()
		if c.off {
			c.mu.Unlock()
			return nil, f.error(kind, off, n, ErrPowerOff)
		}
	}
	return h, nil
}

func (p *planned) matches(op Op) bool {
	return (!p.struck || p.Forever) && op.Index >= p.At && p.On&op.Kind != 0 &&
		(p.Len == 0 || op.Kind != OpSync && op.Flash == p.Flash && op.Off < p.Off+p.Len && p.Off < op.Off+op.Len)
}

func (f *flash) flip(p *Fault, op Op) {
	off, n := op.Off, op.Len
	if p.Len > 0 {
		off, n = max(0, p.Off), min(p.Len, f.size-p.Off)
	}
	if n <= 0 {
		return
	}
	rng := newRand(p.Seed, op.Index)
	for range max(1, p.N) {
		f.alter(off+rng.Int64N(n), 1<<rng.IntN(8), 0)
	}
}

func (f *flash) powerCut(h *hit, kind OpKind, off, n int64) error {
	f.c.cut(h.Loss, newRand(h.Seed, h.index))
	return f.error(kind, off, n, ErrPowerOff)
}

// readHit reads as h decides.
func (f *flash) readHit(h *hit, p []byte, off int64) (int, error) {
	n := int64(len(p))
	switch h.Kind {
	case Fail:
		return 0, f.error(OpRead, off, n, ErrFault)
	case Skip:
		return len(p), nil
	case Misdirect:
		off, _ = f.elsewhere(h, off, n)
		f.read(p, off, f.c.weak)
		return len(p), nil
	}
	return 0, f.powerCut(h, OpRead, off, n)
}

// writeHit writes as h decides.
func (f *flash) writeHit(h *hit, p []byte, off int64) (int, error) {
	n := int64(len(p))
	switch h.Kind {
	case Fail:
		done := p[:max(0, min(h.N, n))]
		f.program(done, off)
		f.logWrite(done, off)
		return len(done), f.error(OpWrite, off, n, ErrFault)
	case Skip:
		f.believe(off, n, true)
		return len(p), nil
	case Misdirect:
		if to, ok := f.elsewhere(h, off, n); ok {
			f.program(p, to)
			f.logWrite(p, to)
		}
		f.believe(off, n, true)
		return len(p), nil
	case CutAfter:
		f.program(p, off)
		f.logWrite(p, off)
	case CutPrefix, CutBits, CutWeak:
		f.tear(h, p, off, n)
	}
	return 0, f.powerCut(h, OpWrite, off, n)
}

// eraseHit erases unit k as h decides.
func (f *flash) eraseHit(h *hit, k int, off, n int64) error {
	if h.Kind != CutBefore && h.Kind != Skip && h.Kind != Fail {
		f.wear[k]++
	}
	switch h.Kind {
	case Fail:
		return f.error(OpErase, off, n, ErrFault)
	case Skip:
		f.believe(off, n, false)
		return nil
	case Misdirect:
		if to, ok := f.elsewhere(h, off, 1); ok {
			_, start, size := f.unit(to)
			if start != off {
				f.erase(start, size)
				f.logErase(start, size)
			}
		}
		f.believe(off, n, false)
		return nil
	case CutAfter:
		f.erase(off, n)
		f.logErase(off, n)
	case CutPrefix, CutBits, CutWeak:
		f.tear(h, nil, off, n)
	}
	return f.powerCut(h, OpErase, off, n)
}

// syncHit syncs as h decides.
func (f *flash) syncHit(h *hit) error {
	switch h.Kind {
	case Fail:
		if f.durable != nil && h.Loss != LoseNone {
			if h.Loss == LoseSome {
				f.pages, f.durable = f.durable, f.pages
				f.replay(newRand(h.Seed, h.index))
				f.pages, f.durable = f.durable, f.pages
			}
			f.log = nil
		}
		return f.error(OpSync, 0, 0, ErrFault)
	case Skip:
		return nil
	case Misdirect:
		f.flush()
		return nil
	case CutAfter:
		f.flush()
	}
	return f.powerCut(h, OpSync, 0, 0)
}

// elsewhere returns another place for n bytes, and whether there is one.
func (f *flash) elsewhere(h *hit, off, n int64) (int64, bool) {
	if h.N > 0 && f.inside(h.N, n) {
		return h.N - h.N%f.writeSize, true
	}
	places := (f.size-n)/f.writeSize + 1
	if places < 2 {
		return off, false
	}
	to := newRand(h.Seed, h.index).Int64N(places-1) * f.writeSize
	if to >= off {
		to += f.writeSize
	}
	return to, true
}

// tear cuts the power while p is written, or [off, off+n) erased if p is nil.
func (f *flash) tear(h *hit, p []byte, off, n int64) {
	rng := newRand(h.Seed, h.index)
	if f.durable != nil && (h.Loss == LoseAll || h.Loss == LoseSome && rng.IntN(2) == 0) {
		return // it never left the cache
	}
	// What was unsynced before comes first; powerCut has nothing left to decide
	// in this flash.
	f.lose(h.Loss, rng)
	defer copy(f.durable, f.pages)

	old, weak := make([]byte, n), make([]byte, n)
	f.read(old, off, nil)
	f.readWeak(weak, off)
	target := bytes.Clone(f.blankBytes(n))
	for i, b := range p {
		target[i] = f.mix(old[i], b)
	}
	switch h.Kind {
	case CutPrefix:
		done := min(h.N, n)
		if done <= 0 && n > 1 {
			done = 1 + rng.Int64N(n-1)
		}
		f.store(target[:done], nil, off)
		if p != nil { // the unit in which the power failed counts as written, those after it do not
			n = min(n, (done+f.writeSize-1)/f.writeSize*f.writeSize)
		}
		f.believe(off, n, true)
	case CutBits:
		density := rng.IntN(3)
		for i := range target {
			u := rng.Uint32()
			mask, v, w := byte(u), byte(u>>8), byte(u>>16)
			switch density {
			case 0:
				mask &= v & w
			case 1:
				mask |= v | w
			}
			target[i] = old[i] ^ (old[i]^target[i])&mask
			weak[i] &^= mask
		}
		f.store(target, weak, off)
	case CutWeak:
		clear(weak)
		weakBits(weak, old, target, h.N, rng)
		f.store(target, weak, off)
	}
}

// weakBits marks about k of the bits that differ between old and target, or as
// many as rng says if k is 0.
func weakBits(weak, old, target []byte, k int64, rng *rand.Rand) {
	var changed []int
	for i := range old {
		if old[i] != target[i] {
			changed = append(changed, i)
		}
	}
	if len(changed) == 0 {
		return
	}
	if k <= 0 {
		switch rng.IntN(3) {
		case 0:
			k = 1
		case 1:
			k = 2 + rng.Int64N(7)
		default:
			for _, i := range changed {
				weak[i] = (old[i] ^ target[i]) & byte(rng.Uint32())
			}
			return
		}
	}
	for range k {
		i := changed[rng.IntN(len(changed))]
		diff := old[i] ^ target[i]
		for b := byte(1) << rng.IntN(8); ; b = bits.RotateLeft8(b, 1) {
			if diff&b != 0 {
				weak[i] |= b
				break
			}
		}
	}
}
