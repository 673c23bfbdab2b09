package ota

import (
	"bytes"
	"crypto/sha256"
	"io"
	"slices"
	"sort"
)

// samples is how many chunks of a slot are tried before all of them are hashed.
const samples = 64

// Where the bytes of a chunk come from.
const (
	inPlace    uint8 = iota // nowhere: the target holds them
	fromData                // from the image
	fromTarget              // from the target: a neighbour in the same unit differs
	fromOther               // and up: from the plan's other slots
)

// source is a part of another slot that chunks may be copied from.
type source struct {
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

// plan finds out what need not be read from the image, and selects the rest.
func (p *pipe) plan() error {
	sel, ok := p.job.data.(Selector)
	chunks := p.job.want.Chunks
	if !ok || chunks == nil || sequential(p.f) {
		return nil
	}
	pl := &plan{chunks: chunks, size: p.size, others: p.job.others}
	pl.from = bytes.Repeat([]byte{fromData}, len(chunks.SHA256))
	if err := p.planTarget(pl); err != nil {
		return err
	}
	if err := p.planOthers(pl); err != nil {
		return err
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
	pays, err := p.pays(r, p.size, func(i int64, sum [32]byte) bool { return sum == pl.chunks.SHA256[i] })
	if err != nil || !pays {
		return err
	}
	err = p.hashes(r, p.size, func(i int64, sum [32]byte) bool {
		if sum == pl.chunks.SHA256[i] {
			pl.from[i] = inPlace
		}
		return true
	})
	if err != nil || p.size == 0 {
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
	lo, hi := p.size-p.reach(), p.size
	if first := int64(bytes.IndexByte(pl.from, fromData)); first >= 0 {
		lo, hi = p.start(first*pl.chunks.Size)-p.reach(), min(pl.chunks.end(first, p.size)+p.reach(), p.size)
	}
	for i := max(lo, 0) / pl.chunks.Size; i*pl.chunks.Size < hi; i++ {
		pl.from[i] = fromData
	}
	return nil
}

// planOthers finds chunks in other slots.
func (p *pipe) planOthers(pl *plan) error {
	if len(pl.others) == 0 {
		return nil
	}
	var missing []uint32 // by digest
	for i, from := range pl.from {
		if from == fromData {
			missing = append(missing, uint32(i))
		}
	}
	digest := func(k int) []byte { return pl.chunks.SHA256[missing[k]][:] }
	slices.SortFunc(missing, func(a, b uint32) int {
		return bytes.Compare(pl.chunks.SHA256[a][:], pl.chunks.SHA256[b][:])
	})
	// find calls fn for each missing chunk with this digest.
	find := func(sum [32]byte, fn func(i uint32)) (found bool) {
		k := sort.Search(len(missing), func(k int) bool { return bytes.Compare(digest(k), sum[:]) >= 0 })
		for ; k < len(missing) && bytes.Equal(digest(k), sum[:]); k++ {
			fn(missing[k])
			found = true
		}
		return found
	}
	left := len(missing)
	for n, s := range pl.others {
		if left == 0 {
			return nil
		}
		pays, err := p.pays(s.f, s.size, func(_ int64, sum [32]byte) bool { return find(sum, func(uint32) {}) })
		if err != nil {
			return err
		}
		if !pays {
			continue
		}
		if pl.at == nil {
			pl.at = make([]int64, len(pl.from))
		}
		err = p.hashes(s.f, s.size, func(at int64, sum [32]byte) bool {
			find(sum, func(i uint32) {
				if pl.from[i] == fromData {
					pl.from[i], pl.at[i] = fromOther+uint8(n), at*pl.chunks.Size
					left--
				}
			})
			return left > 0
		})
		if err != nil {
			return err
		}
	}
	return nil
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
// accident, do not count beside others.
func (p *pipe) pays(r io.ReaderAt, size int64, match func(i int64, sum [32]byte) bool) (bool, error) {
	chunk := p.job.want.Chunks.Size
	n := size / chunk
	if n <= 4*samples {
		return true, nil
	}
	grow(&p.in.old, max(chunk, p.block))
	plain, others := false, false
	for k := range int64(samples) {
		if err := p.ctx.Err(); err != nil {
			return false, err
		}
		i := k * (n - 1) / (samples - 1)
		b := p.in.old[:chunk]
		if readFull(r, b, i*chunk) != nil {
			continue
		}
		matches := match(i, sha256.Sum256(b))
		if !all(b, b[0]) {
			if matches {
				return true, nil
			}
			others = true
		} else if matches {
			plain = true
		}
	}
	return plain && !others, nil
}

// hashes calls fn with the digest of each chunk of the first size bytes of r, until
// it returns false or r cannot be read.
func (p *pipe) hashes(r io.ReaderAt, size int64, fn func(i int64, sum [32]byte) bool) error {
	chunk, pos, h := p.job.want.Chunks.Size, int64(0), sha256.New()
	var sum [32]byte
	err := p.in.scan(p.ctx, r, size, p.block, func(b []byte) bool {
		for len(b) > 0 {
			i := pos / chunk
			n := min(int64(len(b)), min((i+1)*chunk, size)-pos)
			h.Write(b[:n])
			b, pos = b[n:], pos+n
			if pos == size || pos%chunk == 0 {
				if h.Sum(sum[:0]); !fn(i, sum) {
					return false
				}
				h.Reset()
			}
		}
		p.in.progress(PhaseChecking, pos, size)
		return true
	})
	if err != nil {
		return p.ctx.Err() // what cannot be read is written anew
	}
	return nil
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
