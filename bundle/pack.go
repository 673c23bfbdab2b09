package bundle

import (
	"bytes"
	"compress/flate"
	"crypto/sha1"
	"crypto/sha256"
	"hash"
	"hash/crc32"
	"io"
	"math"
	"math/bits"
	"runtime"
	"sync"

	"github.com/klauspost/compress/zstd"
	"github.com/slotota/ota"
)

// Defaults of a [Packing] (docs/BUNDLE.md has the measurements).
const (
	DefaultFrame = 64 << 10
	DefaultLevel = 7 // of zstd: made once, downloaded often
	// MinDefaultChunk is the size of chunks where no other is chosen. A device looks
	// for them at every page of its other slots, and so they may be larger than what
	// files move by. It is doubled as long as a part has more than 65536 of them,
	// whose digests take 2 MiB.
	MinDefaultChunk = 16 << 10
)

// Packing says how [Write] stores a part. The zero value stores it as it is,
// without chunks.
type Packing struct {
	Encoding Encoding
	// Level is that of the zstd or gzip program, of which there are fewer here;
	// 0 means DefaultLevel, or 9 for deflate.
	Level int
	// Frame and Window are those of [Storage], for zstd only. 0 means
	// DefaultFrame, and the power of two that is a frame's size or less.
	Frame, Window int64
	// Chunk is the size of the pieces that have digests. 0 means none, or with
	// zstd what follows from MinDefaultChunk, but not more than Frame; less
	// than 0 means none.
	Chunk int64
}

// Packing returns how p is stored, for [Write] to store it in the same way. The
// level is not known.
func (p *Part) Packing() Packing {
	s := p.Storage
	if s == nil {
		return Packing{}
	}
	k := Packing{Encoding: s.Encoding, Frame: s.Frame, Window: s.Window, Chunk: s.Chunk}
	if k.Chunk == 0 {
		k.Chunk = -1
	}
	return k
}

// storage returns the Storage that k makes of size bytes, nil if there is nothing
// to say.
func (k Packing) storage(size int64) *Storage {
	s := &Storage{Encoding: k.Encoding, Chunk: max(k.Chunk, 0)}
	if k.Encoding == EncodingZstd {
		s.Frame = or(k.Frame, DefaultFrame)
		s.Window = or(k.Window, 1<<max(10, bits.Len64(uint64(s.Frame))-1))
		if k.Chunk == 0 {
			for s.Chunk = MinDefaultChunk; s.chunks(size) > 1<<16; {
				s.Chunk *= 2
			}
			s.Chunk = min(s.Chunk, s.Frame)
		}
	} else if s.Encoding == EncodingNone && s.Chunk == 0 {
		return nil
	}
	return s
}

// check refuses what [Part.Packing] and the format have no meaning for.
func (k Packing) check() error {
	switch {
	case k.Encoding != EncodingNone && k.Encoding != EncodingDeflate && k.Encoding != EncodingZstd:
		return because(ErrUnsupported, "encoding %s", ota.Quote(string(k.Encoding)))
	case k.Encoding != EncodingZstd && (k.Frame != 0 || k.Window != 0):
		return because(ErrManifest, "frames without zstd")
	case k.Encoding == EncodingNone && k.Level != 0, k.Level < 0, k.Level > 22, k.Encoding == EncodingDeflate && k.Level > 9:
		return because(ErrManifest, "level %d", k.Level)
	case k.Window != 0 && k.Window&(k.Window-1) != 0:
		return because(ErrManifest, "a window of %d bytes, no power of two", k.Window)
	}
	return nil
}

// sums are the checksums of a file and of what it is stored as.
type sums struct {
	crc    uint32 // of what a zip program extracts
	sha1   [20]byte
	sha256 [32]byte
	stored int64
	digest [32]byte // of what is stored
	kept   uint32   // CRC-32 of that, if it is encoded
	sec    section
}

// encode writes f to w in the way of st and k.
func (b *writer) encode(w io.Writer, f File, st *Storage, k Packing, name string) (s sums, err error) {
	src := &source{ctx: b.ctx, r: io.NewSectionReader(f, 0, f.Size())}
	if st.Chunk > 0 {
		s.sec.chunks = &ota.Chunks{Size: st.Chunk}
	}
	out := &tally{w: w, h: sha256.New()}
	switch st.Encoding {
	case EncodingNone:
		err = b.stream(w, src, f.Size(), st, &s)
		s.stored, s.digest = f.Size(), s.sha256
	case EncodingDeflate:
		var z *flate.Writer
		if z, err = flate.NewWriter(out, int(or(int64(k.Level), flate.BestCompression))); err != nil {
			break
		}
		if err = b.stream(z, src, f.Size(), st, &s); err == nil {
			err = z.Close()
		}
	default:
		err = b.frames(out, src, f.Size(), st, k, &s)
		s.crc = out.crc
	}
	if err != nil {
		return s, &Error{Entry: name, Off: -1, Err: err}
	}
	if st.Encoding != EncodingNone {
		s.stored, s.digest, s.kept = out.n, [32]byte(out.h.Sum(nil)), out.crc
	}
	return s, nil
}

// tally counts and sums what is written.
type tally struct {
	w   io.Writer
	n   int64
	crc uint32
	h   hash.Hash
}

// Write implements io.Writer.
func (t *tally) Write(p []byte) (int, error) {
	n, err := t.w.Write(p)
	t.n += int64(n)
	t.crc = crc32.Update(t.crc, crc32.IEEETable, p[:n])
	t.h.Write(p[:n])
	if err == nil && n < len(p) {
		err = io.ErrShortWrite
	}
	return n, err
}

// stream writes size bytes of src as they are.
func (b *writer) stream(w io.Writer, src io.Reader, size int64, st *Storage, s *sums) error {
	crc, h1, h256 := crc32.NewIEEE(), sha1.New(), sha256.New()
	all := io.MultiWriter(w, crc, h1, h256)
	buf := make([]byte, or(st.Chunk, 32<<10))
	for left := size; left > 0; {
		piece := buf[:min(left, int64(len(buf)))]
		if _, err := io.ReadFull(src, piece); err != nil {
			return err
		}
		left -= int64(len(piece))
		if st.Chunk > 0 {
			s.sec.chunks.SHA256 = append(s.sec.chunks.SHA256, sha256.Sum256(piece))
		}
		if _, err := all.Write(piece); err != nil {
			return err
		}
	}
	s.crc, s.sha1, s.sha256 = crc.Sum32(), [20]byte(h1.Sum(nil)), [32]byte(h256.Sum(nil))
	return nil
}

// encoded is a frame on its way.
type encoded struct {
	in, out []byte
	sum     [32]byte
	chunks  [][32]byte
	done    chan struct{} // holds one
}

// frames writes size bytes of src as zstd frames. They are read and written by
// the caller, and encoded by b.workers goroutines, or by the caller if that is 1.
func (b *writer) frames(w io.Writer, src io.Reader, size int64, st *Storage, k Packing, s *sums) error {
	z, err := zstd.NewWriter(nil, zstd.WithEncoderLevel(zstd.EncoderLevelFromZstd(int(or(int64(k.Level), DefaultLevel)))),
		zstd.WithWindowSize(int(st.Window)), zstd.WithEncoderCRC(false), zstd.WithEncoderConcurrency(b.workers), zstd.WithLowerEncoderMem(true))
	if err != nil {
		return because(ErrManifest, "%w", err)
	}
	n := int(min(int64(b.workers)+1, st.frames(size)))
	if b.workers == 1 {
		n = 1
	}
	var wg sync.WaitGroup
	jobs := make(chan *encoded, n)
	defer wg.Wait()
	defer close(jobs)
	free := make([]*encoded, n)
	for i := range free {
		free[i] = &encoded{in: make([]byte, min(st.Frame, size)), done: make(chan struct{}, 1)}
		if i > 0 {
			wg.Go(func() {
				var last uniform
				for e := range jobs {
					e.encode(z, st.Chunk, &last)
				}
			})
		}
	}
	var last uniform
	pending := make([]*encoded, 0, n)
	h := sha256.New()
	for left := size; left > 0 || len(pending) > 0; {
		for left > 0 && len(free) > 0 {
			e := free[len(free)-1]
			free = free[:len(free)-1]
			e.in = e.in[:min(st.Frame, left)]
			if _, err := io.ReadFull(src, e.in); err != nil {
				return err
			}
			left -= int64(len(e.in))
			if pending = append(pending, e); n == 1 {
				e.encode(z, st.Chunk, &last)
			} else {
				jobs <- e // has room for all
			}
			h.Write(e.in)
		}
		e := pending[0]
		pending = pending[:copy(pending, pending[1:])]
		<-e.done
		if _, err := w.Write(e.out); err != nil {
			return err
		}
		s.sec.frames = append(s.sec.frames, frameInfo{uint32(len(e.out)), e.sum})
		if st.Chunk > 0 {
			s.sec.chunks.SHA256 = append(s.sec.chunks.SHA256, e.chunks...)
		}
		free = append(free, e)
	}
	s.sha256 = [32]byte(h.Sum(nil))
	return nil
}

// uniform is what became of the last frame whose bytes are all the same: of an image
// of a file system, what is free.
type uniform struct {
	b, n int // the byte and how many there are; n is 0 if there was none
	encoded
}

func (e *encoded) encode(z *zstd.Encoder, chunk int64, last *uniform) {
	defer func() { e.done <- struct{}{} }()
	same := bytes.Equal(e.in[1:], e.in[:len(e.in)-1])
	if same && last.n == len(e.in) && last.b == int(e.in[0]) {
		e.out, e.sum, e.chunks = append(e.out[:0], last.out...), last.sum, append(e.chunks[:0], last.chunks...)
		return
	}
	if len(e.in) < 256 {
		e.out = rawFrame(e.out[:0], e.in)
	} else {
		e.out = z.EncodeAll(e.in, e.out[:0])
	}
	e.sum = sha256.Sum256(e.out)
	e.chunks = e.chunks[:0]
	for b := e.in; chunk > 0 && len(b) > 0; {
		n := min(int64(len(b)), chunk)
		e.chunks = append(e.chunks, sha256.Sum256(b[:n]))
		b = b[n:]
	}
	if same {
		last.b, last.n = int(e.in[0]), len(e.in)
		last.out, last.sum, last.chunks = append(last.out[:0], e.out...), e.sum, append(last.chunks[:0], e.chunks...)
	}
}

// rawFrame appends a frame that has the content b, of less than 256 bytes, as it
// is. The encoder would leave out its size.
func rawFrame(dst, b []byte) []byte {
	dst = append(dst, 0x28, 0xb5, 0x2f, 0xfd, 0x20, byte(len(b))) // magic number, single segment, content size
	block := uint32(len(b))<<3 | 1                                // raw, the last
	dst = append(dst, byte(block), byte(block>>8), byte(block>>16))
	return append(dst, b...)
}

// at writes to a Scratch, one byte after another.
type at struct {
	w   io.WriterAt
	off int64
}

// Write implements io.Writer.
func (a *at) Write(p []byte) (int, error) {
	n, err := a.w.WriteAt(p, a.off)
	a.off += int64(n)
	return n, err
}

// deflated returns b compressed.
func deflated(b []byte) []byte {
	var out bytes.Buffer
	z, _ := flate.NewWriter(&out, flate.BestCompression) // fails for other levels only
	_, _ = z.Write(b)                                    // a Buffer does not fail
	_ = z.Close()
	return out.Bytes()
}

// storedBlocks returns b as deflate that compresses nothing (RFC 1951, section
// 3.2.4). There is one form of it only, so that no bit of it can change, and it is
// longer than b: by that devices of Mongoose OS tell that they cannot read it.
func storedBlocks(b []byte) (z []byte) {
	for last := false; !last; {
		n := min(len(b), math.MaxUint16)
		final := byte(0)
		if last = n == len(b); last {
			final = 1
		}
		z = append(z, final)
		z = le.AppendUint16(z, uint16(n))
		z = le.AppendUint16(z, ^uint16(n))
		z, b = append(z, b[:n]...), b[n:]
	}
	return z
}

func defaultWorkers(n int) int {
	if n > 0 {
		return n
	}
	return min(runtime.GOMAXPROCS(0), 8)
}
