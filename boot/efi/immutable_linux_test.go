package efi

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"
)

// TestImmutable: a protected file is changed, stays protected, and can be deleted.
func TestImmutable(t *testing.T) {
	v := Efivarfs{Root: t.TempDir()}
	p := filepath.Join(v.Root, "A")
	require.NoError(t, v.Set("A", 7, []byte{1}))
	_, err := setImmutable(p, true)
	if err == nil {
		t.Cleanup(func() { _, _ = setImmutable(p, false) })
		err = os.WriteFile(p, nil, 0o600)
	}
	if !os.IsPermission(err) {
		t.Skipf("needs a file system with the immutable flag, and the capability to set it: %v", err)
	}
	was, err := setImmutable(p, true)
	if err != nil || !was {
		t.Skipf("needs a file system with the immutable flag, and the capability to set it: %v", err)
	}
	require.NoError(t, v.Set("A", 7, []byte{2}))
	_, b, err := v.Get("A")
	require.NoError(t, err)
	require.Equal(t, []byte{2}, b)
	require.Error(t, os.WriteFile(p, nil, 0o600))
	require.NoError(t, v.Delete("A"))
	_, err = os.Stat(p)
	require.ErrorIs(t, err, os.ErrNotExist)
}
