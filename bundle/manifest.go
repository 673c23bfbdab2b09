package bundle

import (
	"bytes"
	"encoding/hex"
	"encoding/json"
	"maps"
	"math"
	"slices"
	"strconv"
	"strings"

	"github.com/slotota/ota"
	"github.com/slotota/ota/internal/strictjson"
)

// Limits of the format. The length of a name and of a local header are those
// of Mongoose OS devices of 2020 and later; real manifests have less than
// 2 KiB, and real fill parts at most 16 KiB.
const (
	MaxName     = 49       // bytes of an entry's name without its directory
	MaxParts    = 64       // parts of a manifest
	MaxFill     = 16 << 20 // bytes of all fill parts together
	maxDir      = 128      // bytes of the leading directory
	maxHeader   = 2048     // bytes of a header with its name and extra field
	maxCentral  = 512      // the same in the directory, for devices
	maxFileSize = math.MaxUint32 - 1
)

// ManifestName is the name of a bundle's first entry.
const ManifestName = "manifest.json"

// Manifest is the content of manifest.json, the format of Mongoose OS
// (mongoose-os/mos, common/fwbundle/fw_bundle.go; cesanta/mongoose-os,
// tools/mgos_fw_meta.py). All members but Parts are optional.
type Manifest struct {
	Name           string // product
	Platform       string // hardware, such as "esp32"
	Version        string // for people; says nothing about order
	BuildID        string // such as "20250720-234911/v2-g09f6d02"
	BuildTimestamp string // RFC 3339
	Description    string
	// Parts has names that are unique after case folding.
	Parts []Part
	// Security is the security version, the member "security" of the top
	// level member "ota", which Mongoose OS ignores. 0 is the same as none.
	Security uint64
	// Index is the name of the part that holds the index, the member "index"
	// of "ota"; "" if no part has frames or chunks.
	Index string
	// Extra holds all other top level members, and "ota" whole. Of that, only
	// optional members are written: those whose names begin with "x-".
	Extra map[string]json.RawMessage

	raw []byte
}

// Part is a part of a manifest. It has either data in the archive (Src) or
// constant content (Fill).
type Part struct {
	Name string // 1 to 49 bytes of [A-Za-z0-9._+-]
	Type string // such as "app" or "fs"; often absent
	Src  string // name of the archive's entry, or "" if Fill is not nil
	Size int64  // bytes of the content
	Fill *byte  // value of all bytes of the content
	// SHA1 and SHA256 are digests of the content, nil where absent.
	SHA1   *[20]byte
	SHA256 *[32]byte
	// NoUpdate marks a part that is not to be installed by an update, such as
	// a boot loader ("update": false).
	NoUpdate bool
	// Storage says how the content is stored, if not as it is or if it has
	// chunks; else nil.
	Storage *Storage
	// Extra holds all other members, such as "ptn", "addr" and "encrypt".
	Extra map[string]json.RawMessage
}

// Raw returns the bytes that m was parsed from, which are what signatures are
// about; nil if it was not parsed. They must not be changed.
func (m *Manifest) Raw() []byte { return m.raw }

// Part returns the part of that name, or nil.
func (m *Manifest) Part(name string) *Part {
	for i := range m.Parts {
		if m.Parts[i].Name == name {
			return &m.Parts[i]
		}
	}
	return nil
}

// topOrder and partOrder are the members that the genuine writer knows, in
// the order in which it writes them. All others follow, sorted.
var (
	topOrder  = []string{"name", "platform", "description", "version", "build_id", "build_timestamp", "parts"}
	partOrder = []string{"type", "src", "addr", "size", "fill", "flash", "cs_sha1", "cs_sha256", "fs_size",
		"fs_block_size", "fs_erase_size", "fs_page_size", "encrypt", "ptn", "falloc", "sig", "sig_cert", "sign"}
)

// maxExact bounds what JSON numbers can be relied upon to hold (RFC 7493,
// section 2.2).
const maxExact = 1<<53 - 1

// ParseManifest reads a manifest strictly: it refuses duplicate members, also
// if they differ in case only, case variants of known members, values of the
// wrong type, trailing data, nesting deeper than 16 levels, and parts that
// could not be installed. Errors wrap [ErrManifest], [ErrName] (as the file
// name of a part), [ErrNoDigest] (a digest that is not exactly 40 or 64
// hexadecimal digits), [ErrTooLarge], [ErrUnsupported] (another version of the
// format, or a member of "ota" that may not be ignored) or [ErrIndex]. b must
// not be changed afterwards.
func ParseManifest(b []byte) (*Manifest, error) {
	m, err := parseManifest(b)
	if err != nil {
		return nil, &Error{Entry: ManifestName, Off: -1, Err: err}
	}
	return m, nil
}

func parseManifest(b []byte) (*Manifest, error) {
	if err := strictjson.Check(b); err != nil {
		return nil, because(ErrManifest, "%w", err)
	}
	ms, err := strictjson.Members(b)
	if err != nil {
		return nil, because(ErrManifest, "%w", err)
	}
	m := &Manifest{raw: b}
	var mine own
	for _, e := range ms {
		switch e.Name {
		case "name":
			m.Name, err = strictjson.String(e.Value)
		case "platform":
			m.Platform, err = strictjson.String(e.Value)
		case "version":
			m.Version, err = strictjson.String(e.Value)
		case "build_id":
			m.BuildID, err = strictjson.String(e.Value)
		case "build_timestamp":
			m.BuildTimestamp, err = strictjson.String(e.Value)
		case "description":
			m.Description, err = strictjson.String(e.Value)
		case "parts":
			if m.Parts, err = parseParts(e.Value); err != nil {
				return nil, err
			}
		default:
			if err := variant(e.Name, topOrder, "ota"); err != nil {
				return nil, err
			}
			if e.Name == "ota" {
				if mine, err = parseOwn(e.Value); err != nil {
					return nil, because(err, "member \"ota\"")
				}
			}
			if m.Extra == nil {
				m.Extra = map[string]json.RawMessage{}
			}
			m.Extra[e.Name] = e.Value
		}
		if err != nil {
			return nil, because(ErrManifest, "member %s: %w", ota.Quote(e.Name), err)
		}
	}
	if err := m.adopt(mine); err != nil {
		return nil, err
	}
	return m, m.check()
}

func parseParts(b []byte) ([]Part, error) {
	ms, err := strictjson.Members(b)
	if err != nil {
		return nil, because(ErrManifest, "parts: %w", err)
	}
	if len(ms) > MaxParts {
		return nil, because(ErrManifest, "more than %d parts", MaxParts)
	}
	parts := make([]Part, len(ms))
	for i, e := range ms {
		if err := parsePart(&parts[i], e); err != nil {
			return nil, because(err, "part %s", ota.Quote(e.Name))
		}
	}
	return parts, nil
}

func parsePart(p *Part, part strictjson.Member) error {
	p.Name = part.Name
	ms, err := strictjson.Members(part.Value)
	if err != nil {
		return because(ErrManifest, "%w", err)
	}
	sized := false
	for _, e := range ms {
		var n uint64
		known := true
		switch e.Name {
		case "type":
			p.Type, err = strictjson.String(e.Value)
		case "src":
			p.Src, err = strictjson.String(e.Value)
			if err == nil && p.Src == "" {
				return because(ErrManifest, "member \"src\" is empty")
			}
		case "size":
			n, err = strictjson.Uint(e.Value, maxExact)
			p.Size, sized = int64(n), true
		case "fill":
			n, err = strictjson.Uint(e.Value, 255)
			b := byte(n)
			p.Fill = &b
		case "cs_sha1":
			p.SHA1 = new([20]byte)
			err = digest(p.SHA1[:], e.Value)
		case "cs_sha256":
			p.SHA256 = new([32]byte)
			err = digest(p.SHA256[:], e.Value)
		case "update":
			var do bool
			do, err = strictjson.Bool(e.Value)
			p.NoUpdate = !do
		case "addr", "addr1", "fs_size", "fs_block_size", "fs_erase_size", "fs_page_size":
			_, err = strictjson.Uint(e.Value, maxExact)
			known = false
		case "encrypt", "flash":
			_, err = strictjson.Bool(e.Value)
			known = false
		case "ptn":
			_, err = strictjson.String(e.Value)
			known = false
		default:
			if err := variant(e.Name, partOrder, "addr1", "update"); err != nil {
				return err
			}
			known = false
		}
		if err != nil {
			return because(ErrManifest, "member %s: %w", ota.Quote(e.Name), err)
		}
		if !known {
			if p.Extra == nil {
				p.Extra = map[string]json.RawMessage{}
			}
			p.Extra[e.Name] = e.Value
		}
	}
	if !sized {
		return because(ErrManifest, "no member \"size\"")
	}
	return nil
}

// digest decodes the JSON string b, exactly 2*len(dst) hexadecimal digits.
func digest(dst []byte, b []byte) error {
	s, err := strictjson.String(b)
	if err != nil {
		return err
	}
	if len(s) != 2*len(dst) {
		return because(ErrNoDigest, "%d characters instead of %d", len(s), 2*len(dst))
	}
	if _, err := hex.Decode(dst, []byte(s)); err != nil {
		return because(ErrNoDigest, "not hexadecimal")
	}
	return nil
}

// variant refuses a name that another parser might take for a known one.
func variant(name string, known []string, more ...string) error {
	for _, k := range slices.Concat(known, more) {
		if k != name && strings.EqualFold(k, name) {
			return because(ErrManifest, "member %s is not spelled %s", ota.Quote(name), ota.Quote(k))
		}
	}
	return nil
}

// check finds what no single member shows.
func (m *Manifest) check() error {
	if len(m.Parts) == 0 {
		return errNoParts
	}
	names, srcs := map[string]bool{}, map[string]bool{strictjson.Fold(ManifestName): true}
	var fill int64
	for i := range m.Parts {
		p := &m.Parts[i]
		err := p.check()
		switch {
		case err != nil:
		case names[strictjson.Fold(p.Name)]:
			err = because(ErrManifest, "the name is taken")
		case p.Src != "" && srcs[strictjson.Fold(p.Src)]:
			err = because(ErrManifest, "the file %s is named twice", ota.Quote(p.Src))
		case p.Src == "" && p.Size > MaxFill-fill:
			err = because(ErrTooLarge, "more than %d bytes to fill", MaxFill)
		}
		if err != nil {
			return because(err, "part %s", ota.Quote(p.Name))
		}
		names[strictjson.Fold(p.Name)] = true
		if p.Src != "" {
			srcs[strictjson.Fold(p.Src)] = true
		} else {
			fill += p.Size
		}
	}
	return m.checkStorage()
}

func (p *Part) check() error {
	if !plain(p.Name, MaxName) {
		return because(ErrManifest, "not a plain name")
	}
	switch {
	case p.Src == "" && p.Fill == nil:
		return because(ErrManifest, "neither \"src\" nor \"fill\"")
	case p.Src != "" && p.Fill != nil:
		return because(ErrManifest, "both \"src\" and \"fill\"")
	case p.Src != "" && !plain(p.Src, MaxName):
		return because(ErrName, "%s", ota.Quote(p.Src))
	case p.Size <= 0:
		return because(ErrManifest, "size %d", p.Size)
	case p.Size > maxFileSize && (p.Storage == nil || p.Storage.Encoding != EncodingZstd), p.Size > maxZstdSize:
		return because(ErrTooLarge, "size %d", p.Size)
	}
	if p.Storage != nil {
		return p.Storage.check(p)
	}
	return nil
}

// plain says whether s is 1 to max bytes of [A-Za-z0-9._+-], but no name that
// file systems give a meaning to.
func plain(s string, max int) bool {
	if s == "" || len(s) > max || s == "." || s == ".." {
		return false
	}
	for _, c := range []byte(s) {
		switch {
		case 'a' <= c && c <= 'z', 'A' <= c && c <= 'Z', '0' <= c && c <= '9':
		case strings.IndexByte("._+-", c) >= 0:
		default:
			return false
		}
	}
	return true
}

// MarshalJSON returns the text that the genuine writer makes of m: the order
// of its struct members, then all others sorted, and the parts sorted by name. Indented by one blank per
// level it is what mos create-fw-bundle writes.
func (m *Manifest) MarshalJSON() ([]byte, error) {
	var parts object
	for i := range m.Parts {
		p := &m.Parts[i]
		o, err := p.object()
		if err != nil {
			return nil, because(err, "part %s", ota.Quote(p.Name))
		}
		parts = append(parts, strictjson.Member{Name: p.Name, Value: o.marshal()})
	}
	parts.sort(nil)
	o, err := extras(m.Extra)
	if err != nil {
		return nil, err
	}
	for _, e := range []struct{ name, value string }{
		{"name", m.Name}, {"platform", m.Platform}, {"version", m.Version}, {"build_id", m.BuildID},
		{"build_timestamp", m.BuildTimestamp}, {"description", m.Description},
	} {
		if e.value != "" {
			o.set(e.name, quote(e.value))
		}
	}
	o.set("parts", parts.marshal())
	own, err := m.own()
	if err != nil {
		return nil, err
	}
	if o.remove("ota"); len(own) > 0 {
		o.set("ota", own.marshal())
	}
	o.sort(topOrder)
	return o.marshal(), nil
}

func (p *Part) object() (object, error) {
	o, err := extras(p.Extra)
	if err != nil {
		return nil, err
	}
	if p.Type != "" {
		o.set("type", quote(p.Type))
	}
	if p.Src != "" {
		o.set("src", quote(p.Src))
	}
	o.set("size", strconv.AppendInt(nil, p.Size, 10))
	if p.Fill != nil {
		o.set("fill", strconv.AppendUint(nil, uint64(*p.Fill), 10))
	}
	if p.SHA1 != nil {
		o.set("cs_sha1", quote(hex.EncodeToString(p.SHA1[:])))
	}
	if p.SHA256 != nil {
		o.set("cs_sha256", quote(hex.EncodeToString(p.SHA256[:])))
	}
	if p.NoUpdate {
		o.set("update", []byte("false"))
	}
	o.sort(partOrder)
	return o, nil
}

// object is a JSON object whose members have an order.
type object []strictjson.Member

// extras returns the members of m, whose values must be JSON.
func extras(m map[string]json.RawMessage) (o object, err error) {
	for _, k := range slices.Sorted(maps.Keys(m)) {
		if !json.Valid(m[k]) {
			return nil, because(ErrManifest, "the value of %s is not JSON", ota.Quote(k))
		}
		o = append(o, strictjson.Member{Name: k, Value: m[k]})
	}
	return o, nil
}

// set adds a member or replaces it.
func (o *object) set(name string, value []byte) {
	for i := range *o {
		if (*o)[i].Name == name {
			(*o)[i].Value = value
			return
		}
	}
	*o = append(*o, strictjson.Member{Name: name, Value: value})
}

// remove removes a member and reports whether there was one.
func (o *object) remove(name string) bool {
	n := len(*o)
	*o = slices.DeleteFunc(*o, func(m strictjson.Member) bool { return m.Name == name })
	return len(*o) < n
}

// sort puts the members named by first in front, in its order, and the others
// by name.
func (o object) sort(first []string) {
	slices.SortFunc(o, func(a, b strictjson.Member) int {
		i, k := slices.Index(first, a.Name), slices.Index(first, b.Name)
		if i >= 0 && k >= 0 {
			return i - k
		}
		if i >= 0 || k >= 0 {
			return k - i // -1 is the one that is not in first
		}
		return strings.Compare(a.Name, b.Name)
	})
}

func (o object) marshal() []byte {
	var b bytes.Buffer
	b.WriteByte('{')
	for i, m := range o {
		if i > 0 {
			b.WriteByte(',')
		}
		b.Write(quote(m.Name))
		b.WriteByte(':')
		b.Write(m.Value)
	}
	b.WriteByte('}')
	return b.Bytes()
}

func quote(s string) []byte {
	b, _ := json.Marshal(s) // cannot fail for a string
	return b
}
