package filelock

import (
	"context"
	"path/filepath"
	"runtime"
	"testing"

	"github.com/stretchr/testify/require"
)

func TestLock(t *testing.T) {
	if runtime.GOOS == "windows" {
		t.Skip("no file locks here")
	}
	name := filepath.Join(t.TempDir(), "lock")
	unlock, err := Lock(t.Context(), []string{name, name, filepath.Join(t.TempDir(), "no", "dir")})
	require.NoError(t, err)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	_, err = Lock(ctx, []string{name})
	require.ErrorIs(t, err, context.Canceled)
	unlock()
	unlock, err = Lock(t.Context(), []string{name})
	require.NoError(t, err)
	unlock()
}
