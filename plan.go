package ota

import (
	"bytes"
	"context"
	"crypto/sha256"
	"io"
	"slices"
	"sort"
	"sync"
)

const (
	// samples is how many chunks of a slot are tried before all of them are hashed.
	samples = 64
	// maxSliding is the largest chunk that is looked for at every page: where
	// nothing is found, each byte is hashed as often as a chunk has pages.
	maxSliding = 64 << 10
	// maxMisses is how many pages in a row are tried before the steps get longer.
	maxMisses = 64
)

// Where the bytes of a chunk come from.
const (
	inPlace    uint8 = iota // nowhere: the target holds them
	fromData                // from the image
	fromTarget              // from the target: a neighbour in the same unit differs
	fromOther               // and up: from the plan's other slots
)

// source is a part of another slot that chunks may be copied from.
type source struct {
	id   SlotID
	f    Flash
	size int64 // bytes that may be worth looking at
}

// plan says where each chunk of a part comes from. What slots hold is found out by
// hashing, each time. It takes about 45 bytes for each chunk, the digests included.
type plan struct {
	chunks *Chunks
	size   int64 // of the part
	from   []uint8
	at     []int64 // in the other slot; nil if nothing comes from there
	others []source
}

// plan finds out what need not be read from the image, and selects the rest. The
// target and the other slots are hashed side by side.
func (p *pipe) plan() error {
	sel, ok := p.job.data.(Selector)
	chunks := p.job.want.Chunks
	if !ok || chunks == nil || sequential(p.f) {
		return nil
	}
	pl := &plan{chunks: chunks, size: p.size, others: p.job.others}
	pl.from = bytes.Repeat([]byte{fromData}, len(chunks.SHA256))
	s := p.newSearch(pl)
	var aside sync.WaitGroup
	aside.Go(s.run)
	err := p.planTarget(pl)
	if err != nil || bytes.IndexByte(pl.from, fromData) < 0 {
		s.stop()
	}
	close(s.alone)
	aside.Wait()
	if err != nil {
		return err
	}
	if err := p.ctx.Err(); err != nil {
		return err
	}
	for i, from := range pl.from {
		if from == fromData && s.from != nil && s.from[i] != inPlace {
			pl.from[i], pl.at = s.from[i], s.at
		}
	}
	for i, from := range pl.from {
		if from == fromData || from >= fromOther {
			p.planUnits(pl, i)
		}
	}
	p.pl = pl
	return sel.Select(pl.ranges())
}

// planTarget finds the chunks that are in place.
func (p *pipe) planTarget(pl *plan) error {
	if p.rewrite {
		return nil // what reads well now may not when it is copied
	}
	r := p.medium()
	bufs := p.in.reading(p.block)
	if !p.pays(p.ctx, r, p.size, pl.chunks.Size, bufs[0], func(i int64, sum [32]byte) bool { return sum == pl.chunks.SHA256[i] }) {
		return p.ctx.Err()
	}
	tell := func(done, total int64) { p.in.progress(PhaseChecking, done, total) }
	p.hashes(p.ctx, r, p.size, bufs, tell, func(i int64, sum [32]byte) {
		if sum == pl.chunks.SHA256[i] {
			pl.from[i] = inPlace
		}
	})
	if err := p.ctx.Err(); err != nil || p.size == 0 {
		return err
	}
	// Behind the data the last erase unit has to be blank.
	if last, err := p.unit(p.start(p.size - 1)); err != nil {
		return err
	} else if end := p.start(p.size-1) + last; end > p.size {
		if blank, err := p.in.blank(p.f, p.size, end-p.size); err != nil || !blank {
			pl.from[len(pl.from)-1] = fromData
		}
	}
	if !p.job.suspect {
		return nil
	}
	// What a power cut can have touched is written again, see pass.
	lo, hi := p.size-p.block, p.size
	if first := int64(bytes.IndexByte(pl.from, fromData)); first >= 0 {
		lo, hi = p.start(first*pl.chunks.Size)-p.block, min(pl.chunks.end(first, p.size)+p.block, p.size)
	}
	for i := max(lo, 0) / pl.chunks.Size; i*pl.chunks.Size < hi; i++ {
		pl.from[i] = fromData
	}
	return nil
}

// search looks for chunks in other slots.
type search struct {
	p     *pipe
	pl    *plan // its from is not looked at
	ctx   context.Context
	stop  context.CancelFunc
	bufs  [2][]byte
	order []uint32      // the chunks, by their digests
	alone chan struct{} // closed when nobody else reports progress
	step  int64         // chunks lie at multiples of it

	// Where chunks were found, as in plan; inPlace where they were not.
	from []uint8
	at   []int64
}

// newSearch returns a search that has memory of its own: two blocks that are not in
// use yet.
func (p *pipe) newSearch(pl *plan) *search {
	s := &search{p: p, pl: pl, alone: make(chan struct{}), step: pl.chunks.Size}
	s.ctx, s.stop = context.WithCancel(p.ctx)
	for i, b := range p.in.pool(2, p.block) {
		s.bufs[i] = b.buf[:p.block]
	}
	if n := pl.chunks.Size; n%pageSize == 0 && n <= maxSliding && 2*n <= p.block {
		s.step = pageSize
	}
	return s
}

// run searches all other slots. What cannot be read has nothing to offer.
func (s *search) run() {
	defer s.stop()
	if len(s.pl.others) == 0 || len(s.pl.from) == 0 {
		return
	}
	s.order = make([]uint32, len(s.pl.from))
	for i := range s.order {
		s.order[i] = uint32(i)
	}
	slices.SortFunc(s.order, func(a, b uint32) int { return bytes.Compare(s.digest(a), s.digest(b)) })
	s.from, s.at = make([]uint8, len(s.pl.from)), make([]int64, len(s.pl.from))
	for n, o := range s.pl.others {
		if n > 0 {
			<-s.alone
			if s.ctx.Err() != nil || !s.missing() {
				return
			}
		}
		found := func(sum [32]byte, at int64) bool {
			return s.find(sum, func(i uint32) {
				if s.from[i] == inPlace {
					s.from[i], s.at[i] = fromOther+uint8(n), at
				}
			})
		}
		if s.p.pays(s.ctx, o.f, o.size, s.step, s.bufs[0], func(_ int64, sum [32]byte) bool { return s.find(sum, nil) }) {
			if s.step < s.pl.chunks.Size {
				s.slide(o, found)
			} else {
				s.p.hashes(s.ctx, o.f, o.size, &s.bufs, s.progress, func(i int64, sum [32]byte) { found(sum, i*s.pl.chunks.Size) })
			}
		}
	}
}

// missing reports whether there are chunks that neither the target nor a slot has. It
// is known of the target once alone is closed.
func (s *search) missing() bool {
	for i, from := range s.pl.from {
		if from == fromData && s.from[i] == inPlace {
			return true
		}
	}
	return false
}

func (s *search) digest(i uint32) []byte { return s.pl.chunks.SHA256[i][:] }

// find calls fn for each chunk with this digest, and reports whether there is one.
func (s *search) find(sum [32]byte, fn func(i uint32)) (found bool) {
	k := sort.Search(len(s.order), func(k int) bool { return bytes.Compare(s.digest(s.order[k]), sum[:]) >= 0 })
	for ; k < len(s.order) && bytes.Equal(s.digest(s.order[k]), sum[:]); k++ {
		if found = true; fn == nil {
			break
		}
		fn(s.order[k])
	}
	return found
}

func (s *search) progress(done, total int64) {
	select {
	case <-s.alone:
		s.p.in.progress(PhaseChecking, done, total)
	default: // the target has its turn
	}
}

// slide looks for chunks at all multiples of a page, because that is where file systems
// put files. Behind one that was found the next one is expected; where nothing is found
// for long, steps are longer than a chunk by a page, and so come to each place that a
// chunk can begin at. So a slot is hashed once, and a little more.
func (s *search) slide(o source, found func(sum [32]byte, at int64) bool) {
	chunk := s.pl.chunks.Size
	end, pos, misses := int64(0), int64(0), 0
	_ = s.p.in.scan(s.ctx, o.f, o.size, chunk, &s.bufs, func(b []byte, fresh int64) (rest int64) {
		end += fresh
		from := end - int64(len(b)) // of b
		for ; pos+chunk <= end; misses++ {
			if found(sha256.Sum256(b[pos-from:][:chunk]), pos) {
				pos, misses = pos+chunk, -1
			} else if pos += pageSize; misses >= maxMisses {
				pos += chunk
			}
		}
		// The last chunk may be shorter, and lie at the end here, too.
		if last := s.pl.size % chunk; end == o.size && last > 0 && pos == end-last {
			found(sha256.Sum256(b[pos-from:]), pos)
		}
		s.progress(end, o.size)
		return max(end-pos, 0)
	})
}

// planUnits has the chunks that share a unit with chunk i loaded, too: units are
// written whole.
func (p *pipe) planUnits(pl *plan, i int) {
	lo := p.start(int64(i) * pl.chunks.Size)
	for k := i - 1; k >= 0 && pl.chunks.end(int64(k), p.size) > lo && pl.from[k] == inPlace; k-- {
		pl.from[k] = fromTarget
	}
	hi := p.start(pl.chunks.end(int64(i), p.size) - 1)
	if n, err := p.unit(hi); err == nil {
		hi += n
	}
	for k := i + 1; k < len(pl.from) && int64(k)*pl.chunks.Size < hi && pl.from[k] == inPlace; k++ {
		pl.from[k] = fromTarget
	}
}

// pays reports whether it is worth hashing all chunks of r: whether some of a
// sample, the first one in it, match. Chunks of one byte repeated, which match by
// accident, do not count beside others. Chunks may lie at multiples of step.
func (p *pipe) pays(ctx context.Context, r io.ReaderAt, size, step int64, buf []byte, match func(i int64, sum [32]byte) bool) bool {
	chunk := p.job.want.Chunks.Size
	n := size / chunk
	if n <= 4*samples {
		return true
	}
	plain, others := false, false
	var sum [32]byte
	h := sha256.New()
	for k := range int64(samples) {
		i := k * (n - 2) / (samples - 1)
		off := i*chunk + k*step%chunk
		h.Reset()
		same := true // one byte, repeated
		for end := off + chunk; off < end; {
			b := buf[:min(int64(len(buf)), end-off)]
			if ctx.Err() != nil || readFull(r, b, off) != nil {
				break
			}
			h.Write(b)
			same = same && all(b, b[0])
			off += int64(len(b))
		}
		switch matches := match(i, [32]byte(h.Sum(sum[:0]))); {
		case !same && matches:
			return true
		case !same:
			others = true
		case matches:
			plain = true
		}
	}
	return plain && !others
}

// hashes calls fn with the digest of each chunk of the first size bytes of r, until
// it cannot be read: what comes then is as if it were something else.
func (p *pipe) hashes(ctx context.Context, r io.ReaderAt, size int64, bufs *[2][]byte, progress func(done, total int64), fn func(i int64, sum [32]byte)) {
	chunk, pos, h := p.job.want.Chunks.Size, int64(0), sha256.New()
	var sum [32]byte
	_ = p.in.scan(ctx, r, size, 0, bufs, func(b []byte, _ int64) int64 {
		for len(b) > 0 {
			i := pos / chunk
			n := min(int64(len(b)), min((i+1)*chunk, size)-pos)
			h.Write(b[:n])
			b, pos = b[n:], pos+n
			if pos == size || pos%chunk == 0 {
				h.Sum(sum[:0])
				fn(i, sum)
				h.Reset()
			}
		}
		progress(pos, size)
		return 0
	})
}

// ranges returns what is to be read from the image.
func (pl *plan) ranges() []Range {
	var rs []Range
	for i, from := range pl.from {
		if from != fromData {
			continue
		}
		off := int64(i) * pl.chunks.Size
		end := pl.chunks.end(int64(i), pl.size)
		if n := len(rs); n > 0 && rs[n-1].Off+rs[n-1].Len == off {
			rs[n-1].Len = end - rs[n-1].Off
		} else {
			rs = append(rs, Range{off, end - off})
		}
	}
	return rs
}

// next returns the first byte from off on that has to be loaded, or the size.
func (pl *plan) next(off int64) int64 {
	for i := off / pl.chunks.Size; i < int64(len(pl.from)); i++ {
		if pl.from[i] != inPlace {
			return max(off, i*pl.chunks.Size)
		}
	}
	return pl.size
}

// dirty reports whether a chunk that is not in place has bytes from off to end.
func (pl *plan) dirty(off, end int64) bool {
	for i := off / pl.chunks.Size; i < int64(len(pl.from)) && i*pl.chunks.Size < end; i++ {
		if pl.from[i] == fromData || pl.from[i] >= fromOther {
			return true
		}
	}
	return false
}

// piece returns where the bytes from off on come from, and where this ends, at end
// or before: chunks that lie one after another there, too, are one piece.
func (pl *plan) piece(off, end int64) (from uint8, to int64) {
	i := off / pl.chunks.Size
	from, to = pl.from[i], pl.chunks.end(i, pl.size)
	for k := i + 1; to < end && pl.from[k] == from; k++ {
		if from >= fromOther && pl.at[k] != pl.at[k-1]+pl.chunks.Size {
			break
		}
		to = pl.chunks.end(k, pl.size)
	}
	return from, min(to, end)
}

// other returns the slot that the byte at off is copied from, and where it is there.
func (pl *plan) other(off int64, from uint8) (source, int64) {
	i := off / pl.chunks.Size
	return pl.others[from-fromOther], pl.at[i] + off - i*pl.chunks.Size
}
