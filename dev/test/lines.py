"""What Python tests print, a line each, and their total, which run.py adds up. Standard library only."""
import sys
import unittest


class Lines(unittest.TestResult):
    """ok NAME, or FAIL NAME: why"""
    passed = 0

    def addSuccess(self, test):
        self.passed += 1
        print("ok", test.id().split(".", 1)[1], flush=True)

    def fail(self, test, error):
        super().addFailure(test, error)
        why = " ".join(str(error[1]).split())
        print(f"FAIL {test.id().split('.', 1)[1]}: {error[0].__name__}: {why[:300]}", flush=True)

    addFailure = addError = fail

    def addSkip(self, test, reason):
        super().addSkip(test, reason)
        print(f"skip {test.id().split('.', 1)[1]}: {reason}", flush=True)

    def addSubTest(self, test, subtest, error):
        if error:
            self.fail(subtest, error)


def run_all(name, result=None):
    """The tests of the program that was started; returns its exit status."""
    result = result or Lines()
    unittest.defaultTestLoader.loadTestsFromModule(sys.modules["__main__"]).run(result)
    print(f"{name}: {result.passed} passed, {len(result.failures)} failed")
    return 1 if result.failures else 0
