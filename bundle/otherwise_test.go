package bundle_test

import (
	"bytes"
	"encoding/json"
	"fmt"
	"hash/crc32"
	"strings"
	"testing"

	"github.com/slotota/ota"
	"github.com/slotota/ota/bundle"
	"github.com/stretchr/testify/require"
)

// entriesOf takes an archive apart that archive.bytes has made.
func entriesOf(file []byte) (es []entry) {
	for off := 0; le.Uint32(file[off:]) == 0x04034b50; {
		n, size := int(le.Uint16(file[off+26:])), int(le.Uint32(file[off+18:]))
		es = append(es, entry{name: string(file[off+30 : off+30+n]), data: string(file[off+30+n : off+30+n+size])})
		off += 30 + n + size
	}
	return es
}

// What the manifest says of the index and of stored bytes must be so.
func TestStoredOtherwise(t *testing.T) {
	data := string(text(1500, 1))
	good := entriesOf((&crafted{frames: []string{frame(t, data[:1024]), frame(t, data[1024:])}, size: 1500, window: 1024, frame: 1024, chunk: 512, content: data}).bytes())
	require.NoError(t, everyWay(t, *lax, (&archive{entries: good}).bytes()))
	for name, c := range map[string]struct {
		do  func(es []entry)
		err error
	}{
		"longer index": {func(es []entry) { es[1].data += "x" }, bundle.ErrSize},
		"other digest of the index": {func(es []entry) {
			es[0].data = strings.Replace(es[0].data, sum256(es[1].data), sum256("x"), 1)
		}, ota.ErrDigest},
		"frames in a deflated entry": {func(es []entry) { both(&es[2], 8, func(off int) func([]byte) { return put16(off, 8) }) }, bundle.ErrMismatch},
	} {
		es := append([]entry(nil), good...)
		c.do(es)
		require.ErrorIs(t, everyWay(t, *lax, (&archive{entries: es}).bytes()), c.err, name)
	}

	// The same of a deflated part.
	whole := string(deflated(t, []byte(data)))
	deflate := func(stored, sum string) []byte {
		part := entry{name: "a.bin", data: stored}
		header := func(off int) func([]byte) {
			return func(h []byte) {
				put16(off, 8)(h)
				put32(off+6, crc32.ChecksumIEEE([]byte(data)))(h)
				put32(off+14, uint32(len(data)))(h)
			}
		}
		both(&part, 8, header)
		manifest := fmt.Sprintf(`{"parts":{"a":{"src":"a.bin","size":%d,"cs_sha256":%q}},"ota":{"format":1,"parts":{"a":{"encoding":"deflate","stored_size":%d,"stored_sha256":%q}}}}`,
			len(data), sum256(data), len(stored), sum)
		return (&archive{entries: []entry{{name: "manifest.json", data: manifest}, part}}).bytes()
	}
	require.NoError(t, everyWay(t, *lax, deflate(whole, sum256(whole))))
	require.ErrorIs(t, everyWay(t, *lax, deflate(whole, sum256("x"))), ota.ErrDigest)
	require.ErrorIs(t, everyWay(t, *lax, deflate(whole+"x", sum256(whole+"x"))), bundle.ErrCorrupt)
}

// A part that is passed over is not in an archive that ends within it.
func TestPassedOverBeyondTheEnd(t *testing.T) {
	file := (&crafted{frames: []string{frame(t, string(text(1024, 1)))}, size: 1024, window: 1024, frame: 1024, content: string(text(1024, 1))}).bytes()
	b, err := lax.OpenRanges(t.Context(), source(file[:bytes.LastIndex(file, []byte("PK\x03\x04"))+100]))
	for err == nil {
		_, err = b.Next(t.Context())
	}
	require.ErrorIs(t, err, bundle.ErrTruncated)
}

func TestOpenRangesWithoutPolicy(t *testing.T) {
	file := pack(t, map[string][]byte{"a": text(100, 1)}, nil, nil)
	var none *bundle.Policy
	_, err := none.OpenRanges(t.Context(), source(file))
	require.ErrorIs(t, err, bundle.ErrPolicy)
	_, err = (&bundle.Policy{AllowUnsigned: true, Threshold: 3}).OpenRanges(t.Context(), source(file))
	require.ErrorIs(t, err, bundle.ErrPolicy)
}

// A member that has a field of its own is not written twice.
func TestExtraMemberWithAField(t *testing.T) {
	m := &bundle.Manifest{Name: "n", Platform: "p", Version: "v", Extra: map[string]json.RawMessage{"name": []byte(`"x"`), "more": []byte(`1`)}}
	m.Parts = []bundle.Part{{Name: "a", Src: "a.bin"}}
	var w bytes.Buffer
	require.NoError(t, bundle.Write(t.Context(), &w, m, map[string]bundle.File{"a.bin": bytes.NewReader([]byte("abc"))}, nil))
	b, err := lax.Open(t.Context(), &w)
	require.NoError(t, err)
	require.Equal(t, "n", b.Info().Name)
	require.JSONEq(t, `1`, string(b.Manifest().Extra["more"]))
}
