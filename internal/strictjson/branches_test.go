package strictjson

import (
	"testing"

	"github.com/stretchr/testify/require"
)

// Members of a text that never passed Check are an error, not a guess.
func TestMembersUnchecked(t *testing.T) {
	for _, bad := range []string{"", "[", "1", `{"a`, `{"a":`, `{"a":}`, `{"a":1 "b":2}`} {
		_, err := Members([]byte(bad))
		require.Error(t, err, bad)
	}
}
