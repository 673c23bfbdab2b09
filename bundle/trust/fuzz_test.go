package trust

import (
	"os"
	"testing"

	"github.com/stretchr/testify/require"
)

func seed(f *testing.F, names ...string) {
	for _, name := range names {
		b, err := os.ReadFile("testdata/golden/" + name)
		require.NoError(f, err)
		f.Add(b)
	}
}

// What is read as a note has one form.
func FuzzParseNote(f *testing.F) {
	seed(f, "note", "trust")
	f.Add([]byte("x\n\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		n, err := ParseNote(b)
		if err != nil {
			requireTyped(t, err, "%q", b)
			return
		}
		require.Equal(t, string(b), string(n.Bytes()))
		_, err = n.SignedBy(nil)
		require.NoError(t, err, "golang.org/x/mod reads it too")
	})
}

// What is read as a record has one form, and keeps to the limits.
func FuzzParseRecord(f *testing.F) {
	b, err := os.ReadFile("testdata/golden/trust")
	require.NoError(f, err)
	n, err := ParseNote(b)
	require.NoError(f, err)
	f.Add(n.Text)
	f.Fuzz(func(t *testing.T, text string) {
		r, err := ParseRecord(text)
		if err != nil {
			requireTyped(t, err, "%q", text)
			return
		}
		again, err := r.Text()
		require.NoError(t, err)
		require.Equal(t, text, again)
		require.GreaterOrEqual(t, r.Root.Threshold, 1)
		require.GreaterOrEqual(t, r.Release.Threshold, 1)
	})
}

// No chain leads away from a record that has not signed it.
func FuzzUpdate(f *testing.F) {
	seed(f, "trust")
	b, err := os.ReadFile("testdata/golden/trust")
	require.NoError(f, err)
	a, err := Open(b)
	require.NoError(f, err)
	f.Fuzz(func(t *testing.T, b []byte) {
		_, err := a.Update(b)
		requireTyped(t, err, "%q", b)
		if o, err := Open(b); err == nil {
			require.Equal(t, string(b), string(o.Bytes()))
		} else {
			requireTyped(t, err, "%q", b)
		}
	})
}
