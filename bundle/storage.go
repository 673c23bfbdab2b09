package bundle

import (
	"encoding/hex"
	"encoding/json"
	"slices"
	"strconv"
	"strings"

	"github.com/slotota/ota"
	"github.com/slotota/ota/internal/strictjson"
)

// FormatVersion is the version of what this package writes under the member
// "ota" of a manifest, and the only one that it reads (docs/BUNDLE.md).
const FormatVersion = 1

// Encoding says how the bytes of a part are stored in the archive.
type Encoding string

// The encodings of format version 1.
const (
	// EncodingNone stores what is installed.
	EncodingNone Encoding = ""
	// EncodingDeflate is the compression of zip archives, method 8 (RFC 1951):
	// one stream with a window of 32 KiB, read from its beginning only.
	EncodingDeflate Encoding = "deflate"
	// EncodingZstd is a sequence of independent Zstandard frames (RFC 8878),
	// which zstd -d decodes as one.
	EncodingZstd Encoding = "zstd"
)

// Limits of the format.
const (
	MaxFrame      = 64 << 20 // bytes of a frame, and of its window
	MaxChunk      = 64 << 20 // bytes of a chunk
	minUnit       = 512      // of which chunks and frames are multiples
	maxZstdSize   = 1 << 40  // bytes of a part that is stored as zstd
	optionalStart = "x-"     // of the names of members that may be ignored
)

// Storage says how a part is stored, if there is more to say than that it is
// (member "parts" of "ota"). Size, SHA1 and SHA256 of a [Part] are about the
// bytes that are installed, whatever its encoding.
type Storage struct {
	Encoding Encoding
	// Size and SHA256 are about the stored bytes of an encoded part; 0 if they
	// are those that are installed.
	Size   int64
	SHA256 [32]byte
	// Frame is how many bytes each zstd frame makes when it is decoded, but for
	// the last one, which makes the rest. Window bounds the distances inside a
	// frame: a decoder that writes as it goes needs that much memory. Both are
	// 0 for other encodings.
	Frame, Window int64
	// Chunk is the size of the pieces that have digests, 0 if there are none.
	Chunk int64
	// Section is the SHA-256 of the part's section of the index, which has the
	// sizes and digests of its frames and the digests of its chunks; 0 if there
	// are neither.
	Section [32]byte
	// Extra holds the optional members that this package does not know.
	Extra map[string]json.RawMessage
}

// indexed says whether the part has a section in the index.
func (s *Storage) indexed() bool { return s != nil && (s.Frame > 0 || s.Chunk > 0) }

// frames returns how many frames a part of size bytes has.
func (s *Storage) frames(size int64) int64 { return pieces(size, s.Frame) }

// chunks returns how many chunks a part of size bytes has.
func (s *Storage) chunks(size int64) int64 { return pieces(size, s.Chunk) }

// section returns the length of the section of a part of size bytes.
func (s *Storage) section(size int64) int64 {
	return s.frames(size)*lenFrameInfo + s.chunks(size)*lenDigest
}

func pieces(size, piece int64) int64 {
	if piece == 0 {
		return 0
	}
	return (size-1)/piece + 1
}

// own is the member "ota" of a manifest.
type own struct {
	security uint64
	index    string
	parts    []strictjson.Member
}

// Members of "ota" and of its "parts".
var (
	ownNames     = []string{"format", "security", "index", "parts"}
	storageNames = []string{"encoding", "stored_size", "stored_sha256", "window", "frame", "chunk", "section_sha256"}
)

// parseOwn reads the member "ota".
func parseOwn(b []byte) (o own, err error) {
	ms, err := strictjson.Members(b)
	if err != nil {
		return o, because(ErrManifest, "%w", err)
	}
	format := uint64(0)
	for _, e := range ms { // decides what the others mean
		if e.Name == "format" {
			if format, err = strictjson.Uint(e.Value, maxExact); err != nil {
				return o, because(ErrManifest, "member \"format\": %w", err)
			}
			if format != FormatVersion {
				return o, because(ErrUnsupported, "format version %d", format)
			}
		}
	}
	for _, e := range ms {
		switch e.Name {
		case "format":
		case "security":
			o.security, err = strictjson.Uint(e.Value, maxExact)
		case "index":
			o.index, err = strictjson.String(e.Value)
		case "parts":
			o.parts, err = strictjson.Members(e.Value)
		default:
			if err := unknownMember(e.Name, ownNames); err != nil {
				return o, err
			}
		}
		if err != nil {
			return o, because(ErrManifest, "member %s: %w", ota.Quote(e.Name), err)
		}
	}
	if format == 0 && (o.index != "" || o.parts != nil) {
		return o, because(ErrManifest, "no member \"format\"")
	}
	return o, nil
}

// unknownMember says what is wrong with a member that is not in known, if
// anything.
func unknownMember(name string, known []string) error {
	if strings.HasPrefix(name, optionalStart) {
		return nil
	}
	if err := variant(name, known); err != nil {
		return err
	}
	return because(ErrUnsupported, "member %s", ota.Quote(name))
}

// parseStorage reads a member of "parts" of "ota".
func parseStorage(b []byte) (*Storage, error) {
	ms, err := strictjson.Members(b)
	if err != nil {
		return nil, because(ErrManifest, "%w", err)
	}
	s := &Storage{}
	got := map[string]bool{}
	for _, e := range ms {
		got[e.Name] = true
		var n uint64
		switch e.Name {
		case "encoding":
			var name string
			name, err = strictjson.String(e.Value)
			s.Encoding = Encoding(name)
			if err == nil && s.Encoding != EncodingDeflate && s.Encoding != EncodingZstd {
				return nil, because(ErrUnsupported, "encoding %s", ota.Quote(name))
			}
		case "stored_size":
			n, err = strictjson.Uint(e.Value, maxFileSize)
			s.Size = int64(n)
		case "stored_sha256":
			err = digest(s.SHA256[:], e.Value)
		case "window":
			n, err = strictjson.Uint(e.Value, MaxFrame)
			s.Window = int64(n)
		case "frame":
			n, err = strictjson.Uint(e.Value, MaxFrame)
			s.Frame = int64(n)
		case "chunk":
			n, err = strictjson.Uint(e.Value, MaxChunk)
			s.Chunk = int64(n)
		case "section_sha256":
			err = digest(s.Section[:], e.Value)
		default:
			if err := unknownMember(e.Name, storageNames); err != nil {
				return nil, err
			}
			if s.Extra == nil {
				s.Extra = map[string]json.RawMessage{}
			}
			s.Extra[e.Name] = e.Value
		}
		if err != nil {
			return nil, because(ErrManifest, "member %s: %w", ota.Quote(e.Name), err)
		}
	}
	// What an encoding needs is there, and nothing else is.
	for _, name := range storageNames[1:] {
		want := false
		switch name {
		case "stored_size", "stored_sha256":
			want = s.Encoding != EncodingNone
		case "window", "frame":
			want = s.Encoding == EncodingZstd
		case "chunk":
			want = got[name]
		case "section_sha256":
			want = got["chunk"] || s.Encoding == EncodingZstd
		}
		if got[name] != want {
			return nil, because(ErrManifest, "member %q: has %v, needs %v", name, got[name], want)
		}
	}
	if got["chunk"] && s.Chunk == 0 {
		return nil, because(ErrManifest, "member \"chunk\": 0")
	}
	return s, nil
}

// check holds s against the part that it is about.
func (s *Storage) check(p *Part) error {
	switch {
	case p.Src == "":
		return because(ErrManifest, "stored, but without \"src\"")
	case p.SHA256 == nil:
		return because(ErrNoDigest, "no \"cs_sha256\"")
	case s.Encoding != EncodingNone && s.Size <= 0:
		return because(ErrManifest, "member \"stored_size\": %d", s.Size)
	case s.Encoding == EncodingZstd && (s.Frame <= 0 || s.Frame%minUnit != 0):
		return because(ErrManifest, "frames of %d bytes", s.Frame)
	case s.Encoding == EncodingZstd && (s.Window < 1<<10 || s.Window > max(s.Frame, 1<<10)):
		return because(ErrManifest, "a window of %d bytes for frames of %d", s.Window, s.Frame)
	case s.Chunk < 0 || s.Chunk%minUnit != 0:
		return because(ErrManifest, "chunks of %d bytes", s.Chunk)
	case s.Chunk > 0 && s.Frame%s.Chunk != 0:
		return because(ErrManifest, "frames of %d bytes with chunks of %d", s.Frame, s.Chunk)
	}
	return nil
}

// adopt puts what the member "ota" says where it belongs.
func (m *Manifest) adopt(o own) error {
	m.Security, m.Index = o.security, o.index
	for _, e := range o.parts {
		p := m.Part(e.Name)
		if p == nil {
			return because(ErrManifest, "\"ota\" tells of part %s, which there is not", ota.Quote(e.Name))
		}
		s, err := parseStorage(e.Value)
		if err != nil {
			return because(err, "part %s in \"ota\"", ota.Quote(e.Name))
		}
		p.Storage = s
	}
	return nil
}

// checkStorage finds what contradicts itself in what m says about storage.
func (m *Manifest) checkStorage() error {
	size := int64(0)
	for _, p := range m.indexed() {
		n := p.Storage.section(p.Size)
		if size += n; n > maxIndex || size > maxIndex { // of at most 64 parts
			return because(ErrTooLarge, "an index of more than %d bytes", maxIndex)
		}
	}
	if size == 0 {
		if m.Index != "" {
			return because(ErrManifest, "an index of nothing")
		}
		return nil
	}
	x := m.Part(m.Index)
	switch {
	case m.Index == "":
		return because(ErrManifest, "no member \"index\"")
	case x == nil, x.Src == "", !x.NoUpdate,
		x.Storage != nil && (x.Storage.Encoding != EncodingDeflate || x.Storage.indexed()):
		return because(ErrManifest, "part %s is no index", ota.Quote(m.Index))
	case x.SHA256 == nil:
		return because(ErrNoDigest, "part %s has none", ota.Quote(m.Index))
	case x.Size != lenIndexHeader+size:
		return because(ErrIndex, "%d bytes instead of %d", x.Size, lenIndexHeader+size)
	}
	return nil
}

// indexed returns the parts that have a section in the index, in its order.
func (m *Manifest) indexed() (ps []*Part) {
	for i := range m.Parts {
		if m.Parts[i].Storage.indexed() {
			ps = append(ps, &m.Parts[i])
		}
	}
	slices.SortFunc(ps, func(a, b *Part) int { return strings.Compare(a.Name, b.Name) })
	return ps
}

// own returns the member "ota" as it is to be written, nil if there is none.
func (m *Manifest) own() (object, error) {
	var o object
	if b := m.Extra["ota"]; b != nil {
		ms, err := strictjson.Members(b)
		if err != nil {
			return nil, because(ErrManifest, "member \"ota\": %w", err)
		}
		o = ms
	}
	for _, name := range ownNames {
		o.remove(name)
	}
	var parts object
	for i := range m.Parts {
		if p := &m.Parts[i]; p.Storage != nil {
			s, err := p.Storage.object()
			if err != nil {
				return nil, because(err, "part %s", ota.Quote(p.Name))
			}
			parts = append(parts, strictjson.Member{Name: p.Name, Value: s.marshal()})
		}
	}
	parts.sort(nil)
	if parts != nil || m.Index != "" {
		o.set("format", strconv.AppendUint(nil, FormatVersion, 10))
	}
	if m.Security != 0 {
		o.set("security", strconv.AppendUint(nil, m.Security, 10))
	}
	if m.Index != "" {
		o.set("index", quote(m.Index))
	}
	if parts != nil {
		o.set("parts", parts.marshal())
	}
	o.sort(ownNames)
	return o, nil
}

func (s *Storage) object() (object, error) {
	o, err := extras(s.Extra)
	if err != nil {
		return nil, err
	}
	if s.Encoding != EncodingNone {
		o.set("encoding", quote(string(s.Encoding)))
		o.set("stored_size", strconv.AppendInt(nil, s.Size, 10))
		o.set("stored_sha256", quote(hex.EncodeToString(s.SHA256[:])))
	}
	if s.Frame != 0 {
		o.set("window", strconv.AppendInt(nil, s.Window, 10))
		o.set("frame", strconv.AppendInt(nil, s.Frame, 10))
	}
	if s.Chunk != 0 {
		o.set("chunk", strconv.AppendInt(nil, s.Chunk, 10))
	}
	if s.indexed() {
		o.set("section_sha256", quote(hex.EncodeToString(s.Section[:])))
	}
	o.sort(storageNames)
	return o, nil
}
