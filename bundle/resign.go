package bundle

import (
	"bytes"
	"context"
	"crypto"
	"encoding/base64"
	"io"

	"github.com/slotota/ota"
	"github.com/slotota/ota/internal/strictjson"
)

// Signatures returns the signatures in the content of extra field 0x293a of a
// manifest's entry, DER by index; nil where there is none. They are not verified.
// Errors wrap [ErrFormat] or [ErrSignature].
func Signatures(extra []byte) ([MaxKeys][]byte, error) {
	var der [MaxKeys][]byte
	var sigs [MaxKeys]string
	if _, err := parseExtra(extra, &sigs); err != nil {
		return der, &Error{Entry: ManifestName, Off: -1, Err: err}
	}
	for i, s := range sigs {
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

// Resign copies the bundle f to w, with signatures added or replaced: that of
// index i by keys[i]; those where keys has nil or nothing stay. All else keeps its
// bytes, the manifest above all, so that the signatures of others stay valid.
//
// f is verified first, in the way of [Policy.Verify] without keys, and must have a
// SHA-256 for every part. Errors are of type [*Error]. f must not change meanwhile.
func Resign(ctx context.Context, w io.Writer, f File, keys []crypto.Signer) error {
	size := f.Size()
	r, err := (&Policy{AllowUnsigned: true}).Verify(ctx, io.NewSectionReader(f, 0, size))
	if err != nil {
		return err
	}
	o := WriteOptions{Keys: keys, Attrs: r.Attrs()}
	first := r.entries[0]
	members, err := o.resigned(first, r.m.Raw())
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

// resigned returns the extra field of the manifest's entry e, with the signatures
// of o, and those of e where o has none.
func (o *WriteOptions) resigned(e *entry, manifest []byte) ([]byte, error) {
	var sigs [MaxKeys]string
	x, err := e.signatures()
	if err != nil {
		return nil, err
	}
	if x != nil {
		if _, err := parseExtra(x, &sigs); err != nil {
			return nil, err
		}
	}
	signed := false
	for _, k := range o.Keys {
		signed = signed || k != nil
	}
	if !signed {
		return nil, because(ErrPolicy, "no key to sign with")
	}
	fresh, err := o.extra(manifest)
	if err != nil {
		return nil, err
	}
	members, err := strictjson.Members(fresh[4:])
	if err != nil {
		return nil, because(ErrFormat, "%w", err)
	}
	all := object(members)
	for i, s := range sigs {
		if s != "" && (i >= len(o.Keys) || o.Keys[i] == nil) {
			all.set(sigNames[i], quote(s))
		}
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
