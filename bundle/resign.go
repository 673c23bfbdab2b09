package bundle

import (
	"bytes"
	"context"
	"crypto"
	"encoding/base64"
	"io"
	"slices"

	"github.com/slotota/ota"
	"github.com/slotota/ota/bundle/trust"
	"github.com/slotota/ota/internal/strictjson"
)

// Signatures returns the signatures in the content of extra field 0x293a of a
// manifest's entry, DER by index; nil where there is none. They are not verified.
// Errors wrap [ErrFormat] or [ErrSignature].
func Signatures(extra []byte) ([MaxKeys][]byte, error) {
	var der [MaxKeys][]byte
	var have signatures
	if _, err := parseExtra(extra, &have); err != nil {
		return der, &Error{Entry: ManifestName, Off: -1, Err: err}
	}
	for i, s := range have.sig {
		b, err := base64.StdEncoding.Strict().DecodeString(s)
		if err != nil {
			return der, &Error{Entry: ManifestName, Off: -1, Err: because(ErrSignature, "sig%d", i)}
		}
		if len(b) > 0 {
			der[i] = b
		}
	}
	return der, nil
}

// Note returns the note in the content of extra field 0x293a of a manifest's entry,
// nil if there is none. Nothing about it is verified. Errors are those of [Signatures].
func Note(extra []byte) (*trust.Note, error) {
	var have signatures
	_, err := parseExtra(extra, &have)
	if err == nil && have.note == nil {
		return nil, nil
	}
	var n *trust.Note
	if err == nil {
		if n, err = trust.ParseNote(have.note); err != nil {
			err = because(ErrSignature, "%w", err)
		}
	}
	if err != nil {
		return nil, &Error{Entry: ManifestName, Off: -1, Err: err}
	}
	return n, nil
}

// ResignOptions say what [Resign] changes. What they do not name stays.
type ResignOptions struct {
	// Keys are as in [WriteOptions].
	Keys []crypto.Signer
	// NoteKeys add their signatures to the note, which is made if there is none.
	NoteKeys []*trust.Signer
	// NoteLines are signatures of the note that were made elsewhere, over
	// [trust.ManifestText]. They are not verified.
	NoteLines []trust.Signature
	// Remove removes signatures, before any are added: sig0 to sig7, and those of
	// the note by the name or [trust.Key.ID] of their keys.
	Remove []string
}

// Resign copies the bundle f to w, with other signatures. All else keeps its bytes,
// the manifest above all, so that the signatures of others stay valid. Only the
// fields of the directory that say who made the archive are cleared, with the files'
// attributes, and a note about another manifest is left out, as a tool may leave one
// behind that writes a manifest anew.
//
// f is verified first, in the way of [Policy.Verify] without keys and with the limits
// of the format, and must have a SHA-256 for every part. Errors are of type [*Error].
// f must not change meanwhile.
func Resign(ctx context.Context, w io.Writer, f File, o *ResignOptions) error {
	size := f.Size()
	r, err := (&Policy{AllowUnsigned: true, MaxWindow: MaxFrame, MaxIndex: maxIndex}).Verify(ctx, io.NewSectionReader(f, 0, size))
	if err != nil {
		return err
	}
	first := r.entries[0]
	members, err := o.resigned(first, r)
	if err != nil {
		return &Error{Entry: ManifestName, Off: -1, Err: err}
	}

	// Verify has found: the entries one after the other, the directory with the
	// same entries in the same order, the end record without a comment.
	end := make([]byte, lenEnd)
	if _, err := f.ReadAt(end, size-lenEnd); err != nil && err != io.EOF {
		return &Error{Off: size - lenEnd, Err: err}
	}
	dirOff, dirLen := int64(le.Uint32(end[16:])), int64(le.Uint32(end[12:]))
	dir := make([]byte, dirLen)
	if _, err := f.ReadAt(dir, dirOff); err != nil {
		return &Error{Off: dirOff, Err: err}
	}

	local := append(bytes.Clone(first.raw[:len(first.raw)-len(first.extra)]), members...)
	le.PutUint32(local, sigLocal) // not kept when reading
	le.PutUint16(local[28:], uint16(len(members)))
	old, added := int64(len(first.raw)), int64(len(members)-len(first.extra))
	if lenCentral-lenLocal+len(local) > maxCentral {
		return &Error{Entry: ManifestName, Off: -1, Err: because(ErrHeaderTooLong, "%d bytes of signatures and attributes", len(members))}
	}
	if size > maxFileSize-added {
		return &Error{Off: -1, Err: ErrTooLarge}
	}
	var newDir []byte
	for i := range r.entries {
		head := lenCentral + int(le.Uint16(dir[28:]))
		n := head + int(le.Uint16(dir[30:]))
		c := dir[:n]
		dir = dir[n:]
		if i == 0 {
			c = append(bytes.Clone(c[:head]), members...)
			le.PutUint16(c[30:], uint16(len(members)))
		} else {
			le.PutUint32(c[42:], uint32(int64(le.Uint32(c[42:]))+added))
		}
		le.PutUint16(c[4:], madeBy)
		clear(c[36:42])
		newDir = append(newDir, c...)
	}
	le.PutUint32(end[12:], uint32(len(newDir)))
	le.PutUint32(end[16:], uint32(dirOff+added))

	b := &writer{ctx: ctx, w: w}
	if err := b.write(local); err != nil {
		return err
	}
	src := &source{ctx: ctx, r: io.NewSectionReader(f, old, dirOff-old)}
	n, err := io.CopyBuffer(onlyWriter{w}, src, make([]byte, 32<<10))
	if err == nil && n != dirOff-old {
		err = ota.ErrChanged
	}
	if err != nil {
		return &Error{Off: old + n, Err: err}
	}
	return b.write(append(newDir, end...))
}

// onlyWriter hides ReadFrom of a file, which would go past the buffer.
type onlyWriter struct{ io.Writer }

// resigned returns the extra field of the manifest's entry e of r, with the changes
// of o.
func (o *ResignOptions) resigned(e *entry, r *Reader) ([]byte, error) {
	if o == nil {
		o = &ResignOptions{}
	}
	var have signatures
	x, err := e.signatures()
	if err != nil {
		return nil, err
	}
	if x != nil {
		if _, err := parseExtra(x, &have); err != nil {
			return nil, err
		}
	}
	n := &trust.Note{Text: trust.ManifestText(r.m.Raw())}
	if have.note != nil {
		old, err := trust.ParseNote(have.note)
		if err == nil && old.Text == n.Text {
			n = old
		}
	}
	for _, name := range o.Remove {
		i := slices.Index(sigNames, name)
		if i >= 0 && have.sig[i] != "" {
			have.sig[i] = ""
		} else if !n.Remove(name) {
			return nil, because(ota.ErrInvalid, "there is no signature of %s to be removed", ota.Quote(name))
		}
	}
	n.Add(o.NoteLines...)
	if err := n.Sign(o.NoteKeys...); err != nil {
		return nil, because(ErrSignature, "%w", err)
	}
	if _, err := trust.ParseNote(n.Bytes()); err != nil {
		return nil, because(ErrSignature, "%w", err) // a line that is none
	}
	if len(o.NoteKeys)+len(o.NoteLines)+len(o.Remove) == 0 && !slices.ContainsFunc(o.Keys, func(k crypto.Signer) bool { return k != nil }) {
		return nil, because(ErrPolicy, "no key to sign with")
	}
	fresh, err := (&WriteOptions{Keys: o.Keys, Attrs: r.Attrs()}).extra(r.m.Raw())
	if err != nil {
		return nil, err
	}
	var all object
	if fresh != nil {
		ms, err := strictjson.Members(fresh[4:])
		if err != nil {
			return nil, because(ErrFormat, "%w", err)
		}
		all = ms
	}
	for i, s := range have.sig {
		if s != "" && (i >= len(o.Keys) || o.Keys[i] == nil) {
			all.set(sigNames[i], quote(s))
		}
	}
	if len(n.Signatures) > 0 {
		if r.Attrs()[noteName] != nil {
			return nil, because(ErrFormat, "the attribute %q is where the note goes", noteName)
		}
		all.set(noteName, quote(string(n.Bytes())))
	}
	if len(all) == 0 {
		return nil, nil
	}
	all.sort(nil)
	body := all.marshal()
	if len(body) > maxHeader {
		return nil, because(ErrHeaderTooLong, "%d bytes of signatures and attributes", len(body))
	}
	h := le.AppendUint16(nil, extraID)
	h = le.AppendUint16(h, uint16(len(body)))
	return append(h, body...), nil
}
