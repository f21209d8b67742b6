"Options of the tests."


def pytest_addoption(parser):
    parser.addoption("--screenshots", metavar="FOLDER",
                     help="also write pictures of the widgets in JupyterLab, to look at")
    parser.addoption("--serve-results", metavar="FILE",
                     help="also write what the tests of the engine found")
