package trust

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"strings"
	"unicode/utf8"

	"golang.org/x/mod/sumdb/note"

	"github.com/slotota/ota"
)

// Limits of notes.
const (
	MaxNote       = 8 << 10 // bytes
	MaxSignatures = 32      // lines, also of unknown keys
)

// First lines of texts. They keep signatures of one kind of text from being used
// for another, and name the version of the format.
const (
	manifestHeader = "slotota bundle v1\n"
	recordHeader   = "slotota trust v1\n"
)

// linePrefix begins a signature line: an em dash and a blank.
const linePrefix = "— "

// ManifestText returns the text that the release keys sign for a bundle with
// these bytes as manifest.json: three lines, with the length and the SHA-256.
func ManifestText(manifest []byte) string {
	sum := sha256.Sum256(manifest)
	return fmt.Sprintf("%ssize %d\nsha256 %s\n", manifestHeader, len(manifest), b64.EncodeToString(sum[:]))
}

// IsManifestNote says whether b begins as a note about a manifest does, in any
// version of the format. Nothing is verified.
func IsManifestNote(b []byte) bool { return bytes.HasPrefix(b, []byte("slotota bundle v")) }

// Note is a text with signatures. Nothing about it is verified.
type Note struct {
	Text       string // lines of UTF-8, each with its line feed
	Signatures []Signature
}

// Signature is a signature line of a note.
type Signature struct {
	Name string // of the key
	Hash uint32 // key hash
	Sig  []byte // usually 64 bytes, but other kinds of keys exist
}

// ID returns the ID that the key has if it is the one that is named. See [Key.ID].
func (s *Signature) ID() string { return id(s.Name, s.Hash) }

// String returns the line, without its line feed.
func (s *Signature) String() string {
	return linePrefix + s.Name + " " + b64.EncodeToString(append(binary.BigEndian.AppendUint32(nil, s.Hash), s.Sig...))
}

// ParseSignature reads a signature line without its line feed, as String writes it.
// Errors wrap [ErrFormat].
func ParseSignature(line string) (Signature, error) {
	rest, ok := strings.CutPrefix(line, linePrefix)
	name, text, _ := strings.Cut(rest, " ")
	if !ok || checkName(name) != nil {
		return Signature{}, because(ErrFormat, "signature line %s", ota.Quote(line))
	}
	raw, err := b64.DecodeString(text)
	if err != nil || len(raw) < 5 || strings.ContainsAny(text, "\r\n") {
		return Signature{}, because(ErrFormat, "signature line of %s", ota.Quote(name))
	}
	return Signature{name, binary.BigEndian.Uint32(raw), raw[4:]}, nil
}

// ParseNote reads a note in the one form that Bytes writes. It may have no
// signature at all. Errors wrap [ErrFormat] or [ErrTooLarge].
func ParseNote(b []byte) (*Note, error) {
	if len(b) > MaxNote {
		return nil, because(ErrTooLarge, "a note of %d bytes, at most %d", len(b), MaxNote)
	}
	if !utf8.Valid(b) || slices.ContainsFunc(b, func(c byte) bool { return c < ' ' && c != '\n' || c == 0x7f }) {
		return nil, because(ErrFormat, "not UTF-8, or a control character")
	}
	text, lines, ok := strings.Cut(string(b), "\n\n")
	if !ok {
		return nil, because(ErrFormat, "no blank line between text and signatures")
	}
	n := &Note{Text: text + "\n"}
	for lines != "" {
		var line string
		if line, lines, ok = strings.Cut(lines, "\n"); !ok {
			return nil, because(ErrFormat, "the last line has no end")
		}
		s, err := ParseSignature(line)
		switch {
		case err != nil:
			return nil, err
		case n.index(s.Name, s.Hash) >= 0:
			return nil, because(ErrFormat, "two signatures of %s", s.ID())
		case len(n.Signatures) == MaxSignatures:
			return nil, because(ErrTooLarge, "more than %d signatures", MaxSignatures)
		}
		n.Signatures = append(n.Signatures, s)
	}
	return n, nil
}

func (n *Note) index(name string, hash uint32) int {
	return slices.IndexFunc(n.Signatures, func(s Signature) bool { return s.Name == name && s.Hash == hash })
}

// Bytes returns the note: the text, a blank line, the signature lines.
func (n *Note) Bytes() []byte {
	var b bytes.Buffer
	b.WriteString(n.Text + "\n")
	for _, s := range n.Signatures {
		b.WriteString(s.String() + "\n")
	}
	return b.Bytes()
}

// Add adds signatures that were made elsewhere. One by the same key is replaced.
// They are not verified.
func (n *Note) Add(sigs ...Signature) {
	for _, s := range sigs {
		if i := n.index(s.Name, s.Hash); i >= 0 {
			n.Signatures[i] = s
		} else {
			n.Signatures = append(n.Signatures, s)
		}
	}
}

// Sign adds signatures by keys. One by the same key is replaced.
func (n *Note) Sign(keys ...*Signer) error {
	for _, k := range keys {
		if k == nil {
			return because(ErrKey, "no key")
		}
		sig, err := k.Sign([]byte(n.Text))
		if err != nil {
			return err
		}
		n.Add(Signature{k.Name(), k.KeyHash(), sig})
	}
	return nil
}

// Remove removes the signatures of keys of that name or [Key.ID], and reports
// whether there were any.
func (n *Note) Remove(name string) bool {
	had := len(n.Signatures)
	n.Signatures = slices.DeleteFunc(n.Signatures, func(s Signature) bool { return s.Name == name || s.ID() == name })
	return len(n.Signatures) < had
}

// SignedBy returns those of keys that have signed n. One wrong signature by one of
// them is an error that wraps [ErrSignature], however many others are right: either
// somebody tried to forge it, or the note is damaged. Signatures by other keys are
// of no account, and none at all is no error.
func (n *Note) SignedBy(keys []Key) ([]Key, error) {
	known := make([]note.Verifier, len(keys))
	for i, k := range keys {
		known[i] = k
	}
	if len(n.Signatures) == 0 {
		return nil, nil
	}
	var unsigned *note.UnverifiedNoteError
	var wrong *note.InvalidSignatureError
	open, err := note.Open(n.Bytes(), note.VerifierList(known...))
	switch {
	case errors.As(err, &unsigned):
		return nil, nil
	case errors.As(err, &wrong):
		return nil, because(ErrSignature, "of %s", id(wrong.Name, wrong.Hash))
	case err != nil:
		return nil, because(ErrFormat, "%w", err)
	case open.Text != n.Text:
		return nil, because(ErrFormat, "the text is ambiguous")
	}
	var by []Key
	for _, s := range open.Sigs {
		by = append(by, keys[slices.IndexFunc(keys, func(k Key) bool { return k.name == s.Name && k.hash == s.Hash })])
	}
	return by, nil
}

// verify returns the keys of r that have signed n, if they are enough.
func (n *Note) verify(r *Role, role string) ([]Key, error) {
	by, err := n.SignedBy(r.Keys)
	if err != nil {
		return nil, err
	}
	// Names do not count: the same key may go by two of them.
	distinct := map[[32]byte]bool{}
	for _, k := range by {
		distinct[k.pub] = true
	}
	switch {
	case r.Threshold > 0 && len(distinct) >= r.Threshold:
		return by, nil
	case len(by) == 0 && len(n.Signatures) > 0:
		return nil, because(ErrUnknownKey, "needs %d %s keys, signed by %s", r.Threshold, role, n.signers())
	}
	return nil, because(ErrUnsigned, "needs %d %s keys, signed by %d", r.Threshold, role, len(distinct))
}

// signers lists who seems to have signed, for messages.
func (n *Note) signers() string {
	var ids []string
	for i := range n.Signatures[:min(len(n.Signatures), 3)] {
		ids = append(ids, n.Signatures[i].ID())
	}
	if len(n.Signatures) > len(ids) {
		ids = append(ids, "…")
	}
	return strings.Join(ids, ", ")
}
