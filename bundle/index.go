package bundle

import (
	"bytes"
	"crypto/sha256"
	"io"

	"github.com/slotota/ota"
)

// The index: a header, then one section for each part that has frames or
// chunks, in the order of the parts' names, without anything between or after
// them. A section is the list of the part's frames, in their order, each the
// stored size as a number of 32 bits and the SHA-256 of the stored bytes; then
// the SHA-256 of each chunk of the installed bytes. How many there are follows
// from the manifest. All numbers are little endian.
const (
	indexMagic     = "OTAINDEX"
	lenIndexHeader = 8 + 4 + 4 // magic, version, number of sections
	lenFrameInfo   = 4 + lenDigest
	lenDigest      = sha256.Size
	maxIndex       = 64 << 20
)

// section is what the index says about a part.
type section struct {
	frames []frameInfo
	chunks *ota.Chunks
}

type frameInfo struct {
	size   uint32 // stored bytes
	sha256 [32]byte
}

func indexHeader(sections int) []byte {
	h := le.AppendUint32([]byte(indexMagic), FormatVersion)
	return le.AppendUint32(h, uint32(sections))
}

// bytes returns the section as it is stored.
func (s *section) bytes() []byte {
	var b []byte
	for i := range s.frames {
		b = le.AppendUint32(b, s.frames[i].size)
		b = append(b, s.frames[i].sha256[:]...)
	}
	if s.chunks != nil {
		for i := range s.chunks.SHA256 {
			b = append(b, s.chunks.SHA256[i][:]...)
		}
	}
	return b
}

// maxStored returns the most bytes that a frame of n bytes is stored in: all of
// its blocks raw (RFC 8878, section 3.1.1.2, of 1 KiB at least), and the longest
// header and trailer.
func maxStored(n int64) int64 { return n + 3*(n/(1<<10)+1) + 18 + 4 }

// readIndex reads the index of m, whose length was checked, from r, which
// yields exactly that.
func readIndex(r io.Reader, m *Manifest) (map[string]*section, error) {
	parts := m.indexed()
	head := make([]byte, lenIndexHeader)
	if _, err := io.ReadFull(r, head); err != nil {
		return nil, err
	}
	switch v := le.Uint32(head[len(indexMagic):]); {
	case string(head[:len(indexMagic)]) != indexMagic:
		return nil, because(ErrIndex, "it does not begin with %s", indexMagic)
	case v != FormatVersion:
		return nil, because(ErrUnsupported, "an index of version %d", v)
	case !bytes.Equal(head, indexHeader(len(parts))):
		return nil, because(ErrIndex, "%d sections instead of %d", le.Uint32(head[len(indexMagic)+4:]), len(parts))
	}
	all := map[string]*section{}
	for _, p := range parts {
		s, err := readSection(r, p)
		if err != nil {
			return nil, because(err, "part %s", ota.Quote(p.Name))
		}
		all[p.Name] = s
	}
	return all, nil
}

func readSection(r io.Reader, p *Part) (*section, error) {
	h := sha256.New()
	r = io.TeeReader(r, h)
	s := &section{}
	var total int64
	b := make([]byte, lenFrameInfo)
	n := p.Storage.frames(p.Size)
	s.frames = make([]frameInfo, 0, n)
	for i := range n {
		if _, err := io.ReadFull(r, b); err != nil {
			return nil, err
		}
		f := frameInfo{le.Uint32(b), [32]byte(b[4:])}
		size := min(p.Storage.Frame, p.Size-i*p.Storage.Frame)
		if f.size == 0 || int64(f.size) > maxStored(size) {
			return nil, because(ErrIndex, "frame %d of %d bytes is stored in %d", i, size, f.size)
		}
		if total += int64(f.size); total > p.Storage.Size {
			return nil, because(ErrIndex, "the frames have more than %d bytes", p.Storage.Size)
		}
		s.frames = append(s.frames, f)
	}
	if n > 0 && total != p.Storage.Size {
		return nil, because(ErrIndex, "the frames have %d bytes instead of %d", total, p.Storage.Size)
	}
	if n := p.Storage.chunks(p.Size); n > 0 {
		s.chunks = &ota.Chunks{Size: p.Storage.Chunk, SHA256: make([][32]byte, n)}
		for i := range s.chunks.SHA256 {
			if _, err := io.ReadFull(r, s.chunks.SHA256[i][:]); err != nil {
				return nil, err
			}
		}
	}
	if [32]byte(h.Sum(nil)) != p.Storage.Section {
		return nil, because(ErrDigest, "SHA-256 of the section")
	}
	return s, nil
}
