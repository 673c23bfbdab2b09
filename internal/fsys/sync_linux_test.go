package fsys

import (
	"syscall"
	"testing"

	"github.com/stretchr/testify/require"
)

// TestSyncs: what was written is synced, and that it could not be is told. Linux
// refuses to sync /dev/null.
func TestSyncs(t *testing.T) {
	require.ErrorIs(t, OS{}.WriteFile("/dev/null", []byte("a")), syscall.EINVAL)
	require.ErrorIs(t, OS{}.Overwrite("/dev/null", nil), syscall.EINVAL)
}
