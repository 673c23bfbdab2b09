package mos_test

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/rand"
	"encoding/json"
	"testing"

	"github.com/mongoose-os/mos/common/fwbundle"
	"github.com/stretchr/testify/require"

	"github.com/slotota/ota/bundle"
	"github.com/slotota/ota/bundle/trust"
)

// The genuine tool reads a bundle with a note. When it writes one anew and carries
// the note over, the note is about another manifest, and is told from one that counts.
func TestGenuineReadsNote(t *testing.T) {
	private, key, err := trust.GenerateKey(rand.Reader, "release")
	require.NoError(t, err)
	k, err := trust.ParseSigner(private)
	require.NoError(t, err)
	sig := newKeys(t, 1)[0]

	var b bytes.Buffer
	m := &bundle.Manifest{Name: "demo", Platform: "esp32", Version: "2.0", BuildID: "b", Parts: []bundle.Part{{Name: "app", Src: "app.bin"}}}
	files := map[string]bundle.File{"app.bin": bytes.NewReader([]byte("app"))}
	require.NoError(t, bundle.Write(t.Context(), &b, m, files, &bundle.WriteOptions{NoteKeys: []*trust.Signer{k}, Keys: []crypto.Signer{sig}}))
	f := genuine(t, b.Bytes())
	data, err := f.GetPartData("app")
	require.NoError(t, err)
	require.Equal(t, "app", string(data))

	r, err := (&bundle.Policy{Keys: []*ecdsa.PublicKey{&sig.PublicKey}}).Verify(t.Context(), bytes.NewReader(b.Bytes()))
	require.NoError(t, err)
	n := trust.Note{Text: trust.ManifestText(r.Manifest().Raw())}
	require.NoError(t, n.Sign(k))
	text, err := json.Marshal(string(n.Bytes()))
	require.NoError(t, err)

	rec := trust.Record{Version: 1, SecurityStep: 1, Root: trust.Role{Threshold: 1}, Release: trust.Role{Threshold: 1, Keys: []trust.Key{key}}}
	private, root, err := trust.GenerateKey(rand.Reader, "root")
	require.NoError(t, err)
	rootKey, err := trust.ParseSigner(private)
	require.NoError(t, err)
	rec.Root.Keys = []trust.Key{root}
	recordText, err := rec.Text()
	require.NoError(t, err)
	record := trust.Note{Text: recordText}
	require.NoError(t, record.Sign(rootKey))
	a, err := trust.Open(record.Bytes())
	require.NoError(t, err)
	p := &bundle.Policy{Trust: a}
	_, err = p.Verify(t.Context(), bytes.NewReader(b.Bytes()))
	require.NoError(t, err)

	f.Description = "changed"
	var anew bytes.Buffer
	require.NoError(t, fwbundle.WriteZipFirmwareBytes(f, &anew, false, map[string]any{"note": json.RawMessage(text)}))
	_, err = p.Verify(t.Context(), bytes.NewReader(anew.Bytes()))
	require.ErrorIs(t, err, trust.ErrText)
	require.ErrorIs(t, err, bundle.ErrSignature)
	var again bytes.Buffer
	require.NoError(t, bundle.Resign(t.Context(), &again, bytes.NewReader(anew.Bytes()), &bundle.ResignOptions{NoteKeys: []*trust.Signer{k}}))
	_, err = p.Verify(t.Context(), bytes.NewReader(again.Bytes()))
	require.NoError(t, err)
}
